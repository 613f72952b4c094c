"""Run telemetry: metrics, events, goodput, throughput, console, trackers, profiler."""
