"""Sockets, limits and deadlines."""
