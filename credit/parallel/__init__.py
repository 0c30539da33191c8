"""Parallelism over a DeviceMesh (dp, tp, domain), applied to plain models from outside."""
