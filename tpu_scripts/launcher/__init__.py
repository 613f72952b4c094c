"""What tpu.py is made of. Only Python's standard library, from 3.9 on: a laptop needs nothing of this project installed."""
