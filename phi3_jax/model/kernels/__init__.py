"""Attention kernels of one device, chosen by the platform that a program is lowered for."""
