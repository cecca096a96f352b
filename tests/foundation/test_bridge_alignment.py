from __future__ import annotations

import numpy as np

from foundation.nn.bridge import tensor_of


def test_copies_lie_in_aligned_memory_and_keep_their_shape() -> None:
    # MKL rounds by alignment; numpy's 16 bytes would make the bits depend on where an array happened to be.
    room = np.arange(4096, dtype=np.float32)
    for offset in range(1, 16):
        array = room[offset : offset + 1200].reshape(30, 40)
        array.flags.writeable = False
        tensor = tensor_of(array)
        assert tensor.data_ptr() % 64 == 0
        assert np.array_equal(tensor.numpy(), array)
    turned = tensor_of(room[:12].reshape(3, 4).T)
    assert turned.is_contiguous()
    assert turned.shape == (4, 3)
    assert tensor_of(np.float32(2.0).reshape(())).shape == ()
