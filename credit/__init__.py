"""Weather and climate models over many devices, with the numbers of one."""

__version__ = "0.2.0"
