"""Conversations: from rows to messages, from messages to token ids of which the answers are targets."""
