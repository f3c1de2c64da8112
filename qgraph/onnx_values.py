"""Values at run time: torch tensor <-> numpy array <-> onnx_ir tensor.

A value is a torch tensor where torch has the element type, a numpy array where it has not (strings as objects, int4 and other
`ml_dtypes`), a list for a sequence, None for an empty optional.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from qgraph.onnx_external import memory_map
from qgraph.types import Dim, TensorType

TORCH_DTYPES: dict[ir.DataType, torch.dtype] = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.INT8: torch.int8,
    ir.DataType.UINT16: torch.uint16,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.BOOL: torch.bool,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.UINT32: torch.uint32,
    ir.DataType.UINT64: torch.uint64,
    ir.DataType.COMPLEX64: torch.complex64,
    ir.DataType.COMPLEX128: torch.complex128,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.FLOAT8E4M3FN: torch.float8_e4m3fn,
    ir.DataType.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
    ir.DataType.FLOAT8E5M2: torch.float8_e5m2,
    ir.DataType.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
    ir.DataType.FLOAT8E8M0: torch.float8_e8m0fnu,
}
"""ONNX element types that torch has, with one element per item."""

_ONNX_DTYPES = {v: k for k, v in TORCH_DTYPES.items()}

# numpy knows these only through ml_dtypes, which torch refuses: the bits travel through an integer view.
_BIT_VIEWS = {torch.bfloat16: np.int16} | {t: np.uint8 for t in TORCH_DTYPES.values() if t.is_floating_point and t.itemsize == 1}


def dtype_name(dtype: ir.DataType) -> str:
    """torch's name of the element type, or ONNX's in lower case where torch has none: "float32", "string", "int4"."""
    found = TORCH_DTYPES.get(dtype)
    return str(found).removeprefix("torch.") if found is not None else dtype.name.lower()


def onnx_dtype(dtype: str | torch.dtype) -> ir.DataType:
    """The inverse of `dtype_name`; also takes a torch dtype. Raises KeyError for a name that ONNX does not have."""
    if isinstance(dtype, torch.dtype):
        return _ONNX_DTYPES[dtype]
    found = getattr(torch, dtype, None)
    return _ONNX_DTYPES[found] if found in _ONNX_DTYPES else ir.DataType[dtype.upper()]


def tensor_type(value: ir.Value) -> TensorType | None:
    """Type of a tensor value; None for sequences, optionals, sparse tensors and unknown types. Negative dimensions are unknown."""
    if not isinstance(value.type, ir.TensorType):
        return None
    return TensorType(dtype_name(value.type.dtype) if value.type.dtype else None, _dims(value.shape))


def _dims(shape: ir.Shape | None) -> tuple[Dim, ...] | None:
    if shape is None:
        return None
    dims = (d if isinstance(d, int) else d.value for d in shape)
    return tuple(None if isinstance(d, int) and d < 0 else d for d in dims)


def ir_shape(type_: TensorType) -> ir.Shape | None:
    return None if type_.shape is None else ir.Shape(type_.shape)


def from_numpy(array: np.ndarray[Any, Any]) -> Any:
    """The array as a torch tensor that shares its memory where torch has the type, else the array itself.

    Read-only memory stays read-only: writing to such a tensor is a segmentation fault, as for every mapped constant."""
    if array.dtype.kind in "OUST":
        return array.astype(object)
    dtype = TORCH_DTYPES.get(ir.DataType.from_numpy(array.dtype))
    if dtype is None:
        return array
    if not array.flags.c_contiguous or not array.dtype.isnative:
        array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    if dtype in _BIT_VIEWS:
        array = array.view(_BIT_VIEWS[dtype])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        found = torch.from_numpy(array)
    return found.view(dtype) if dtype in _BIT_VIEWS else found


def to_numpy(value: Any) -> Any:
    """What `onnx.reference` takes and gives: arrays, lists of arrays, None."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        if value.dtype in _BIT_VIEWS:
            bits = value.contiguous().view(torch.int16 if value.dtype.itemsize == 2 else torch.uint8)
            return bits.numpy().view(_ONNX_DTYPES[value.dtype].numpy())
        return value.resolve_conj().resolve_neg().numpy()
    if isinstance(value, (list, tuple)):
        return [to_numpy(v) for v in value]
    if isinstance(value, ir.TensorProtocol):
        return tensor_array(value)
    return value


def from_reference(value: Any) -> Any:
    """A result of `onnx.reference` as a value."""
    if value is None or isinstance(value, (torch.Tensor, dict)):
        return value
    if isinstance(value, (list, tuple)):
        return [from_reference(v) for v in value]
    return on_default_device(from_numpy(np.asarray(value)))


def on_default_device(value: Any) -> Any:
    """A tensor that an operation has made out of numbers, where torch would make it (`with torch.device("cuda")`)."""
    return value.to(torch.get_default_device()) if isinstance(value, torch.Tensor) else value


def tensor_array(tensor: ir.TensorProtocol) -> np.ndarray[Any, Any]:
    """The elements of a stored tensor; external data is memory-mapped, strings become objects of type str."""
    if isinstance(tensor, ir.ExternalTensor):
        return memory_map(tensor)
    if tensor.dtype == ir.DataType.STRING:
        flat = [s.decode("utf-8", "surrogateescape") if isinstance(s, bytes) else s for s in tensor.numpy().reshape(-1)]
        return np.array([*flat, None], dtype=object)[:-1].reshape(tensor.shape.numpy())
    return tensor.numpy()


def from_ir(tensor: ir.TensorProtocol) -> Any:
    """A stored tensor as a value; external data is memory-mapped, not read."""
    return from_numpy(tensor_array(tensor))


def to_ir(value: Any, name: str) -> ir.TensorProtocol:
    """A value as a tensor to be stored under `name`. Raises KeyError for a torch type that ONNX does not have."""
    if isinstance(value, torch.Tensor):
        dtype = onnx_dtype(value.dtype)
        return ir.Tensor(to_numpy(value.contiguous()), dtype=dtype, shape=ir.Shape(value.shape), name=name)
    if isinstance(value, np.ndarray) and value.dtype == object:
        return ir.StringTensor([s.encode("utf-8", "surrogateescape") for s in value.reshape(-1)], shape=ir.Shape(value.shape), name=name)
    return ir.tensor(value, name=name)
