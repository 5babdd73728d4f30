import numpy as np
import pytest

from mmar_megatron.data.codec import PatchCodec


def test_every_byte_survives() -> None:
    codec = PatchCodec(image_size=32, patch_size=4)
    image_HW3 = np.random.default_rng(0).permutation(np.arange(32 * 32 * 3) % 256).astype(np.uint8).reshape(32, 32, 3)
    tokens_NC = codec.encode(image_HW3)
    assert tokens_NC.shape == (codec.num_tokens, codec.channels) == (64, 48)
    assert tokens_NC.dtype == np.float32
    assert (tokens_NC.min(), tokens_NC.max()) == (-1, 1)
    np.testing.assert_array_equal(codec.decode(tokens_NC), image_HW3)
    np.testing.assert_array_equal(codec.decode(np.stack([tokens_NC, -tokens_NC]))[0], image_HW3)


def test_tokens_are_patches_in_raster_order() -> None:
    codec = PatchCodec(image_size=8, patch_size=4)
    image_HW3 = np.zeros((8, 8, 3), np.uint8)
    image_HW3[0:4, 4:8] = 255
    np.testing.assert_array_equal(codec.encode(image_HW3)[:, 0], [-1, 1, -1, -1])


def test_values_out_of_range_are_clipped() -> None:
    codec = PatchCodec(image_size=4, patch_size=4)
    assert set(codec.decode(np.full((1, 48), 1.5, np.float32)).flat) == {255}
    assert set(codec.decode(np.full((1, 48), -7.0, np.float32)).flat) == {0}


def test_patches_must_fit() -> None:
    with pytest.raises(ValueError, match="image_size 32 is not a multiple of patch_size 5"):
        PatchCodec(image_size=32, patch_size=5)
