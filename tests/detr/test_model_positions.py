import math

import pytest
import torch

from detr_irpe.models.position_encoding import PositionEmbeddingLearned, PositionEmbeddingSine, build_position_encoding
from detr_irpe.nested_tensor import NestedTensor


def map_with_padding(*sizes: tuple[int, int]) -> NestedTensor:
    return NestedTensor.from_images([torch.ones(1, h, w) for h, w in sizes])


def test_sine_is_the_formula():
    """Visible cells counted, scaled to 2 pi with 1e-6 in the divisor, temperature 10000, rows first."""
    channels, sizes = 6, [(3, 4), (2, 2)]
    positions = PositionEmbeddingSine(channels)(map_with_padding(*sizes))
    assert positions.shape == (2, 2 * channels, 3, 4) and positions.dtype == torch.float32
    for image, (height, width) in enumerate(sizes):
        for row in range(height):
            for column in range(width):
                expected = []
                for place, size in ((row + 1, height), (column + 1, width)):
                    for channel in range(channels):
                        angle = place / (size + 1e-6) * 2 * math.pi / 10000 ** (2 * (channel // 2) / channels)
                        expected.append(math.cos(angle) if channel % 2 else math.sin(angle))
                torch.testing.assert_close(positions[image, :, row, column], torch.tensor(expected), rtol=0, atol=2e-6)


def test_sine_does_not_depend_on_the_padding():
    alone = PositionEmbeddingSine(8)(map_with_padding((2, 3)))
    padded = PositionEmbeddingSine(8)(map_with_padding((2, 3), (5, 7)))
    assert torch.equal(padded[:1, :, :2, :3], alone)
    assert padded.isfinite().all()


def test_learned_columns_then_rows():
    embedding = PositionEmbeddingLearned(4)
    positions = embedding(map_with_padding((2, 3), (1, 1)))
    assert positions.shape == (2, 8, 2, 3)
    for row in range(2):
        for column in range(3):
            expected = torch.cat([embedding.col_embed.weight[column], embedding.row_embed.weight[row]])
            assert torch.equal(positions[1, :, row, column], expected)


@pytest.mark.parametrize("size", [(51, 2), (2, 51)])
def test_learned_positions_end_at_fifty(size):
    with pytest.raises(ValueError, match="reach 50 rows and columns; the map is {} x {}. Use --pos".format(*size)):
        PositionEmbeddingLearned(4)(map_with_padding(size))


def test_learned_positions_start_between_zero_and_one():
    for parameter in PositionEmbeddingLearned(8).parameters():
        assert 0 <= parameter.min() < 0.1 and 0.9 < parameter.max() <= 1


def test_names():
    assert isinstance(build_position_encoding("sine", 16), PositionEmbeddingSine)
    assert isinstance(build_position_encoding("learned", 16), PositionEmbeddingLearned)
    with pytest.raises(ValueError, match="--position_embedding 'cosine': expected one of sine, learned"):
        build_position_encoding("cosine", 16)
    for kind, channels, divisor in (("sine", 10, 4), ("sine", 17, 4), ("learned", 17, 2)):
        with pytest.raises(ValueError, match=f"--hidden_dim {channels}: .* '{kind}' need a multiple of {divisor}"):
            build_position_encoding(kind, channels)
    with pytest.raises(ValueError, match="even number of channels per axis; got 5"):
        PositionEmbeddingSine(5)
