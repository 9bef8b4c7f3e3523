# SPDX-License-Identifier: Apache-2.0
"""What stands above many runs: ablation grids, tables, reports and plots."""
