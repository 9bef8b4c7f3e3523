"""What stands above many runs: ablation grids, tables, reports and plots."""
