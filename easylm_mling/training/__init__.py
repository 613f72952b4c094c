"""Training as pure functions: the step, the loss, the optimizer, the spike guard; and how they are compiled."""
