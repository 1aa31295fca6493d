"""What leaves the denoising loop."""

from __future__ import annotations

import numpy as np
import pytest

from excise.errors import ArtefactError
from excise.serve.denoising import to_uint8

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script`:FutureWarning",  # once, when diffusers is imported
    "ignore:__array__ implementation:DeprecationWarning",  # diffusers' Euler scheduler calls np.array(torch.Tensor)
)


def test_rounding_of_images() -> None:
    from diffusers.image_processor import VaeImageProcessor
    from torch import from_numpy

    values = np.linspace(-1.2, 1.2, 3 * 64 * 64, dtype=np.float32).reshape(1, 3, 64, 64)
    expected = VaeImageProcessor().postprocess(from_numpy(values), output_type="pil")[0]
    np.testing.assert_array_equal(to_uint8(values)[0], np.asarray(expected))


def test_broken_values_are_not_a_picture() -> None:
    with pytest.raises(ArtefactError, match="fp32"):
        to_uint8(np.full((1, 3, 2, 2), np.nan, np.float32))
