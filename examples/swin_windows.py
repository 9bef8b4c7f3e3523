# SPDX-License-Identifier: Apache-2.0
"""timm's Swin with iRPE in its windows. Swin's own bias is a special case of iRPE, so nothing is lost.

    python examples/swin_windows.py

Swin learns one number for each offset and head: iRPE's ``bias`` mode with ``product``, a table for each head, and a
ratio of at least the window's reach, so that every offset has its own bucket. A contextual encoding is then added.
"""

import timm
import torch
from torch import Tensor, nn

from irpe_ops import build_rpe, get_rpe_config, rpe_attention


class WindowAttention(nn.Module):
    """Takes the place of timm's ``WindowAttention``: ``(windows * B, L, C)`` and a mask ``(windows, L, L)`` or None."""

    def __init__(self, plain: nn.Module, *, contextual: bool = True):
        super().__init__()
        self.window, self.num_heads, self.qkv, self.proj = plain.window_size, plain.num_heads, plain.qkv, plain.proj
        reach = max(plain.window_size) - 1  # the largest offset in a window
        shared = dict(ratio=float(reach), method="product")
        dim = plain.proj.in_features // self.num_heads
        _, self.bias, _ = build_rpe(get_rpe_config(**shared, mode="bias", shared_head=False), dim, self.num_heads)
        config = get_rpe_config(ratio=1.9, method="product", mode="ctx", rpe_on="k") if contextual else None
        _, self.rpe_k, _ = build_rpe(config, dim, self.num_heads)
        self._take_over(plain)

    @torch.no_grad()
    def _take_over(self, plain: nn.Module) -> None:
        length = self.window[0] * self.window[1]
        ids = self.bias.bucket_ids(length, *self.window, plain.proj.weight.device).long()  # (L, L)
        theirs = plain.relative_position_bias_table[plain.relative_position_index.flatten()]  # (L * L, H)
        self.bias.lookup_table_bias[:, ids.flatten()] = theirs.T

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, L, D)
        added = self.bias(q, *self.window)  # broadcasts to (B, H, L, L)
        if mask is not None:
            added = added + mask.repeat(len(x) // len(mask), 1, 1)[:, None]
        out = rpe_attention(q, k, v, rpe_k=self.rpe_k, height=self.window[0], width=self.window[1], attn_mask=added)
        return self.proj(out.transpose(1, 2).flatten(2))


if __name__ == "__main__":
    torch.manual_seed(0)
    model = timm.create_model("swin_tiny_patch4_window7_224", depths=(2, 2), num_heads=(3, 6), num_classes=10).eval()
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        before = model(images)
        for stage in model.layers:
            for block in stage.blocks:
                block.attn = WindowAttention(block.attn)
        after = model(images)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=0)
    added = sum(p.numel() for name, p in model.named_parameters() if "rpe_k" in name)
    print(f"the same output with Swin's bias in iRPE tables; {added:,} parameters of contextual encoding to train")
