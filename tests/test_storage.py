import logging

import numpy as np
import pytest
import torch

from rl2_torchrl import storage
from rl2_torchrl.storage import from_bytes, to_bytes


@pytest.mark.parametrize(
    "array",
    [
        np.arange(4)[::-1],
        np.broadcast_to(np.ones(1), (3,)),
        np.arange(3, dtype=">i4"),
        np.array(2.5),
        np.arange(6.0).reshape(2, 3).T,
    ],
    ids=["turned round", "read-only", "of another byte order", "of no dimension", "transposed"],
)
@pytest.mark.filterwarnings("error")
def test_arrays_come_back_equal(array):
    again = from_bytes(to_bytes({"x": array}), "it")["x"]
    assert (again.shape, again.dtype) == (array.shape, array.dtype.newbyteorder("="))
    np.testing.assert_array_equal(again, array)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (np.array(["2026-01-01"], dtype="datetime64[D]"), r"ndarray of datetime64\[D\]"),
        (torch.zeros(2, dtype=torch.complex128), "Tensor of torch.complex128"),
        (torch.eye(2).to_sparse(), "Tensor of torch.float32"),
    ],
    ids=["days", "complex128", "sparse"],
)
def test_where_it_is_that_cannot_be_saved(value, kind):
    with pytest.raises(TypeError, match=f"env.1 is a {kind}, which cannot be saved.*give tensors, arrays, numbers"):
        to_bytes({"env": [0, value]})


def test_what_was_on_a_device_that_is_not_there_is_read_to_the_cpu(caplog):
    data = to_bytes({"w": torch.arange(3.0), "b": torch.ones(1)}).replace(b'\\"cpu\\"', b'\\"ort\\"')
    data = storage._with_digest(data, storage._NO_DIGEST)
    data = storage._with_digest(data, storage.hashlib.sha256(data).hexdigest())
    with caplog.at_level(logging.WARNING):
        again = from_bytes(data, "it")
    torch.testing.assert_close(again, {"w": torch.arange(3.0), "b": torch.ones(1)})  # devices, too
    assert caplog.text.count("what was on ort when it was saved is read to the CPU") == 1
