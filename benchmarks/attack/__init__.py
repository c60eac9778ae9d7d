"""Attacks on the running service, and what they cost another tenant: `make attack`.

One tenant attacks the real roles on loopback while another tenant makes ordinary calls. Each attack
prints the latency of these calls alone and under attack, and the memory of the roles.
"""
