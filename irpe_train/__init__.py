# SPDX-License-Identifier: Apache-2.0
"""The part of training that does not know what is being trained: processes, checkpoints, precision, logs."""
