"""Serving: a model behind the HTTP interface that the tools people have know."""
