"""The arguments of verbs that several processes run together, one a host, and how they join."""


def add_processes(verb):
    """Add --coordinator, --processes, --process-id and --wait-seconds to a verb's parser."""
    verb.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="of several processes, one a host: a free port of process 0 (a TPU slice needs none of these three)",
    )
    verb.add_argument("--processes", type=int, metavar="N", help="how many processes there are")
    verb.add_argument("--process-id", type=int, metavar="I", help="which one this is, from 0 on")
    verb.add_argument("--wait-seconds", type=float, default=300, help="for the other processes to join (default: 300)")


def joined(a, on_cpu: bool = False):
    """Return the context within which the processes of these arguments are one JAX system (distributed/joining.py)."""
    from easylm_mling.distributed.joining import find_process_group, joined_processes

    group = find_process_group(a.coordinator, a.processes, a.process_id)
    return joined_processes(group, a.wait_seconds, on_cpu)
