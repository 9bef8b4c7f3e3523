"""One file for each fast way to compute `rpe_attention`; the definition is ``irpe_ops/attention.py``."""
