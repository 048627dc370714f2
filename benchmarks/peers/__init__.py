"""Peers: other servers for the same network, measured beside this one."""
