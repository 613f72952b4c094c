"""Processes of one run: joining, agreeing, and the watchdog over them."""
