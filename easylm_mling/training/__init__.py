"""Training as pure functions: step, loss, optimizer, spike guard, digests; and how the step is compiled."""
