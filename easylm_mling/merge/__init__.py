"""Merging checkpoints after training: averages, task arithmetic (the chat vector), and slerp, tensor by tensor."""
