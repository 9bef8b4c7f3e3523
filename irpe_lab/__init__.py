# SPDX-License-Identifier: Apache-2.0
"""Tools over many runs: ablation grids, tables, reports and plots."""
