# SPDX-License-Identifier: Apache-2.0
"""The table of names: the plain model and the encoding of each."""

# Every published name is spelled in full, so that a search finds it.
RPE_MODELS = {
    # 7 x 7 buckets and one for the class token = 50
    "deit_tiny_patch16_224_ctx_product_50_shared_k": ("deit_tiny_patch16_224", "rpe-1.9-product-ctx-1-k"),
    "deit_tiny_patch16_224_ctx_product_50_shared_qk": ("deit_tiny_patch16_224", "rpe-1.9-product-ctx-1-qk"),
    "deit_tiny_patch16_224_ctx_product_50_shared_qkv": ("deit_tiny_patch16_224", "rpe-1.9-product-ctx-1-qkv"),
    "deit_small_patch16_224_ctx_product_50_shared_k": ("deit_small_patch16_224", "rpe-1.9-product-ctx-1-k"),
    "deit_small_patch16_224_ctx_product_50_shared_qk": ("deit_small_patch16_224", "rpe-1.9-product-ctx-1-qk"),
    "deit_small_patch16_224_ctx_product_50_shared_qkv": ("deit_small_patch16_224", "rpe-1.9-product-ctx-1-qkv"),
    "deit_base_patch16_224_ctx_product_50_shared_k": ("deit_base_patch16_224", "rpe-1.9-product-ctx-1-k"),
    "deit_base_patch16_224_ctx_product_50_shared_qk": ("deit_base_patch16_224", "rpe-1.9-product-ctx-1-qk"),
    "deit_base_patch16_224_ctx_product_50_shared_qkv": ("deit_base_patch16_224", "rpe-1.9-product-ctx-1-qkv"),
    # 20, 51 and 56 are the buckets that a 14 x 14 grid actually uses; the tables have 82, 134 and 2 x 82 rows
    "deit_small_patch16_224_ctx_euc_20_shared_k": ("deit_small_patch16_224", "rpe-20-euc-ctx-1-k"),
    "deit_small_patch16_224_ctx_quant_51_shared_k": ("deit_small_patch16_224", "rpe-33-quant-ctx-1-k"),
    "deit_small_patch16_224_ctx_cross_56_shared_k": ("deit_small_patch16_224", "rpe-20-cross-ctx-1-k"),
}

# Sizes that timm does not know: the model for the demo data (8 x 8 tokens, trains in minutes on two cores).
DEMO_SIZES = {"deit_demo_patch4_32": dict(img_size=32, patch_size=4, embed_dim=64, depth=4, num_heads=4)}
