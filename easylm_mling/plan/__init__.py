"""What a run will need and how fast it will be on a TPU slice, said by the real compiler before one is paid for."""
