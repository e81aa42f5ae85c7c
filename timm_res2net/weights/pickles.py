"""Reads pickles of numpy arrays and torch's tensors. Nothing that a pickle names is called: names stand for stand-ins.

What it returns is made of dicts, lists, plain values and the stand-ins below; an `Array` is where a tensor would be,
and `readers.read` makes the tensor when it has checked that.
"""

import pickle
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar

import torch

from .budget import Budget
from .errors import CheckpointError, printable

__all__ = ['Array', 'ArrayUnpickler', 'Options', 'TorchUnpickler', 'Variable']

# Bytes that objects of an opcode take, where they are more than others' (a float in a list takes 32). Containers cost
# more than their bytes: Python's collector goes through all of them, again and again, and is most of the time of a
# file that holds nothing else.
MEMORY = {
    **dict.fromkeys((pickle.EMPTY_DICT, pickle.EMPTY_SET, pickle.FROZENSET, pickle.DICT), 300),
    **dict.fromkeys((pickle.EMPTY_LIST, pickle.MARK, pickle.LIST), 300),
    **dict.fromkeys((pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3), 300),
    **dict.fromkeys((pickle.REDUCE, pickle.NEWOBJ, pickle.BUILD, pickle.BINPERSID), 500),
    **dict.fromkeys((pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE), 120),
    **dict.fromkeys((pickle.UNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE, pickle.BINUNICODE8), 120),
    **dict.fromkeys((pickle.GLOBAL, pickle.STACK_GLOBAL), 120),
}
USUAL = 64
LONGEST_NUMBER = 256  # bytes of an integer
ATOMS = (str, bytes, int, float, bool, type(None))


@dataclass
class Array:
    """Stands in for a tensor: where its bytes are, their type, its shape. None of that has been checked."""

    dtype: Any = None  # a key of `readers.DTYPES`, or torch's type
    sizes: Any = ()
    fetch: Callable[[], Any] | None = None  # its bytes
    fortran: bool = False  # the first index changes fastest
    strides: Any = None  # with `offset` its place in a storage; all that `fetch` returns is the tensor if None
    offset: Any = 0

    def __setstate__(self, state: Any) -> None:
        _, sizes, dtype, fortran, raw = state
        if not isinstance(dtype, ArrayType) or not isinstance(raw, bytes | str):
            raise CheckpointError('it holds an array of Python objects, which are no weights')
        self.dtype, self.sizes, self.fortran = dtype.code, sizes, bool(fortran)
        self.fetch = lambda: raw.encode('latin1') if isinstance(raw, str) else raw


class ArrayType:
    """Stands in for `numpy.dtype`: type code, then byte order."""

    def __init__(self, code: Any, *flags: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        if state[1] not in ('<', '|', '='):
            order = printable(state[1], 10) if isinstance(state[1], str) else 'unknown'
            raise CheckpointError(f'it holds numbers of byte order {order!r}, which no machine for training has')


class Variable:
    """Stands in for a tensor of OneFlow, that holds an array or the name of the folder with its bytes."""

    array: Array | None = None
    folder: str | None = None

    def __setstate__(self, state: Any) -> None:
        array, folder = state.get('data'), state.get('path')
        self.array = array if isinstance(array, Array) else None
        self.folder = folder if isinstance(folder, str) else None


class Options:
    """Stands in for `argparse.Namespace`, which the training scripts save."""

    values: Any = None

    def __setstate__(self, state: Any) -> None:
        self.values = state


class Ignored:
    """Stands in for what files hold beside the weights: mmengine's training statistics, OneFlow's types."""

    def __init__(self, *args: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


@dataclass
class Storage:
    """Stands in for a storage of torch."""

    key: str
    dtype: torch.dtype
    size: int  # in bytes
    offset: int = 0  # of a view, in elements


def is_key(value: Any) -> bool:
    """Whether a value may be the key of a dict: Python hashes it in bounded time and depth."""
    return type(value) in ATOMS or (
        type(value) is tuple and len(value) <= 8 and all(type(each) in ATOMS for each in value)
    )


class Metered(dict[int, Any]):
    """A table of opcodes that spends for each that is looked up."""

    def __init__(self, table: dict[int, Any], budget: Budget) -> None:
        super().__init__(table)
        self.spend = budget.spend
        self.costs = {code[0]: cost for code, cost in MEMORY.items()}

    def __getitem__(self, code: int) -> Any:
        self.spend(self.costs.get(code, USUAL))
        return super().__getitem__(code)


class Stream:
    """A file for an unpickler, that never allocates more than there is to read."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.readline = file.readline
        start = file.tell()
        self.end = file.seek(0, 2)
        file.seek(start)

    def read(self, size: int) -> bytes:
        return self.file.read(size if size < 4096 else min(size, self.end - self.file.tell()))


class ArrayUnpickler(pickle._Unpickler):
    """Builds arrays and plain containers, by an allowlist.

    It derives from Python's own implementation, because that in C allocates memory for any memo index in a file.
    No function that a pickle names is ever called: the allowlist maps names to the methods below.
    """

    memo: dict[int, Any]  # these six are of the base class
    stack: list[Any]
    read: Callable[[int], bytes]
    metastack: list[list[Any]]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: BinaryIO, budget: Budget) -> None:
        super().__init__(Stream(file), encoding='latin1')
        self.budget = budget
        self.dispatch = Metered(self.dispatch, budget)  # type: ignore[misc]  # the loop takes it from the instance
        self.allowed = self.names()

    def names(self) -> dict[str, Any]:
        """What names in a pickle stand for."""
        return {
            'numpy.multiarray._reconstruct': lambda *args: Array(),
            'numpy.numeric._frombuffer': self.array_of_buffer,
            'numpy.ndarray': 'ndarray',  # only an argument of _reconstruct
            'numpy.dtype': ArrayType,
            'collections.OrderedDict': self.mapping,
            'oneflow.Tensor': Variable,
            'oneflow.nn.Parameter': Variable,
            'oneflow._oneflow_internal.dtype': Ignored,
            '_codecs.encode': self.encode,
            'builtins.tuple': self.make_tuple,
        }

    def load(self) -> Any:
        """Reads one pickle; the unpickler can read no other."""
        try:
            return super().load()
        finally:
            self.allowed = {}
            self.memo.clear()  # methods in both refer to the unpickler, and what it keeps would wait for a collection

    def find_class(self, module: str, name: str) -> Any:
        full = f'{module}.{name}'.replace('__builtin__.', 'builtins.')
        if full.startswith('numpy.'):
            full = full.replace('numpy.core.', 'numpy.').replace('numpy._core.', 'numpy.')
        if full not in self.allowed:
            self.refuse(full)
        return self.allowed[full]

    def refuse(self, name: str) -> None:
        raise CheckpointError(f'it wants {printable(name)}, and a file of weights needs only arrays')

    # Opcodes

    def load_build(self) -> None:
        """Sets the state of a stand-in, and of nothing else; attributes of a dict or an array are left out."""
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, dict) or (isinstance(target, Array) and target.fetch):
            return
        if not isinstance(target, Array | ArrayType | Variable | Options | Ignored):
            raise CheckpointError(
                f'it wants to change a {type(target).__name__}, and a file of weights needs only arrays'
            )
        target.__setstate__(state)

    dispatch[pickle.BUILD[0]] = load_build

    def load_bytearray8(self) -> None:
        """Reads a byte array after its size was spent: Python's implementation allocates whatever a file claims."""
        (size,) = struct.unpack('<Q', self.read(8))
        self.budget.spend(size)
        self.append(bytearray(self.read(size)))

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8

    def load_long4(self) -> None:
        """Reads a large integer: arithmetic with a much larger one takes longer than reading it."""
        (size,) = struct.unpack('<i', self.read(4))
        if not 0 <= size <= LONGEST_NUMBER:
            raise CheckpointError(f'it holds a number of {size:,} bytes, which is no size of a tensor')
        self.append(pickle.decode_long(self.read(size)))

    dispatch[pickle.LONG4[0]] = load_long4

    def set_items(self, items: Sequence[Any]) -> None:
        """Sets keys and values; leaves out items with other keys than texts, numbers and tuples of them."""
        target = self.stack[-1]
        if isinstance(target, Ignored):
            return
        if type(target) is not dict:
            raise CheckpointError(f'it wants to change a {type(target).__name__} like a dict')
        for key, value in zip(items[::2], items[1::2]):
            self.budget.spend(100)
            if is_key(key):
                target[key] = value

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items((key, value))

    dispatch[pickle.SETITEM[0]] = load_setitem

    def load_setitems(self) -> None:
        self.set_items(self.pop_mark())

    dispatch[pickle.SETITEMS[0]] = load_setitems

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self.set_items(items)

    dispatch[pickle.DICT[0]] = load_dict

    def add_items(self, items: Sequence[Any]) -> None:
        """Appends to a list or adds to a set."""
        target = self.stack[-1]
        if type(target) is list:
            target.extend(items)
        elif type(target) is set:
            for each in items:
                self.budget.spend(100)
                if is_key(each):
                    target.add(each)
        elif not isinstance(target, Ignored):
            raise CheckpointError(f'it wants to change a {type(target).__name__} like a list')

    def load_append(self) -> None:
        self.add_items((self.stack.pop(),))

    dispatch[pickle.APPEND[0]] = load_append

    def load_appends(self) -> None:
        self.add_items(self.pop_mark())

    dispatch[pickle.APPENDS[0]] = dispatch[pickle.ADDITEMS[0]] = load_appends

    def load_frozenset(self) -> None:
        self.append(self.make_set(self.pop_mark()))

    dispatch[pickle.FROZENSET[0]] = load_frozenset

    # What names stand for

    def array_of_buffer(self, raw: Any, dtype: Any, sizes: Any, order: Any) -> Array:
        self.budget.spend(len(raw))
        found = Array()
        found.__setstate__((1, sizes, dtype, order == 'F', bytes(raw)))
        return found

    def mapping(self, items: Any = ()) -> dict[Any, Any]:
        self.budget.spend(100 * len(items))
        pairs = items.items() if isinstance(items, dict) else items
        return {key: value for key, value in pairs if is_key(key)}

    def encode(self, text: Any, encoding: Any = '') -> bytes:
        self.budget.spend(len(text))
        return text.encode('latin1') if isinstance(text, str) else bytes(0)

    def make_tuple(self, items: Any = ()) -> Any:
        self.budget.spend(100 * len(items))
        return (*items,)

    def make_set(self, items: Any = ()) -> set[Any]:
        self.budget.spend(100 * len(items))
        return {each for each in items if is_key(each)}


class TorchUnpickler(ArrayUnpickler):
    """Builds tensors as well, as views of storages that are elsewhere in the file, for both of torch's formats."""

    def __init__(self, file: BinaryIO, budget: Budget, fetch: Callable[[Storage], Any]) -> None:
        super().__init__(file, budget)
        self.fetch = fetch

    def names(self) -> dict[str, Any]:
        ignored = (
            *('mmengine.logging.history_buffer.HistoryBuffer', 'builtins.getattr', 'builtins.bytearray'),
            *('builtins.complex', 'numpy.multiarray._reconstruct', 'numpy.multiarray.scalar', 'numpy.ndarray'),
            *('numpy.dtype', 'torch.device', 'torch.serialization._get_layout', 'torch.Tensor'),
            *('torch.nn.parameter.Parameter', 'torch.per_tensor_affine', 'torch.per_channel_affine'),
            *('torch.per_channel_affine_float_qparams', 'torch.per_tensor_symmetric', 'torch.per_channel_symmetric'),
        )
        return {
            **super().names(),
            **dict.fromkeys((*ignored, *allowed_by_user()), Ignored),
            **TYPES,
            **{f'torch.{name}Storage': dtype for name, dtype in STORAGES.items()},
            'torch.storage.UntypedStorage': torch.uint8,
            'torch.storage.TypedStorage': torch.uint8,
            'torch._utils._rebuild_tensor': self.view,
            'torch._utils._rebuild_tensor_v2': self.view,
            'torch._utils._rebuild_tensor_v3': self.view_of_type,
            'torch._utils._rebuild_parameter': first_argument,
            'torch._utils._rebuild_parameter_with_state': first_argument,
            'torch._utils._rebuild_device_tensor_from_cpu_tensor': first_argument,
            'torch._tensor._rebuild_from_type_v2': lambda make, type, args, state: make(*args),
            **{f'torch._utils._rebuild_{name}': lambda *args: Array() for name in WITHOUT_VALUES},
            'argparse.Namespace': Options,
            'collections.Counter': self.mapping,
            'torch.Size': self.make_tuple,
            'builtins.set': self.make_set,
        }

    def refuse(self, name: str) -> None:
        before = [each for items in (*self.metastack, self.stack) for each in items]  # what is not complete yet
        if before[-1:] == ['module']:  # with which torch begins a reference to a class, before 1.6
            before.pop()
        whole = 'torch.load(FILE, weights_only=False)'
        weights = f"{{'state_dict': {whole}.state_dict()}}"  # of a file that is one object of this class
        if before:
            weights = (
                "{key: value.state_dict() if hasattr(value, 'state_dict') else dict(value) for key, value in "
                f"{whole}.items() if hasattr(value, 'state_dict') or isinstance(value, dict)}}"
            )
        raise CheckpointError(
            f'it wants {printable(name)}, and a file of weights needs only tensors. If you trust it, save it again '
            f'without, where that can be imported: torch.save({weights}, NEW_FILE)'
        )

    def persistent_load(self, saved: Any) -> Storage:
        """A reference to a storage; of a view of it, before torch 1.6."""
        kind, dtype, key, _, count, *views = saved
        if (
            kind != 'storage'
            or not isinstance(dtype, torch.dtype)
            or not isinstance(key, str)
            or type(count) is not int
        ):
            raise CheckpointError('it is damaged: there is a storage without type, key or size')
        return Storage(key, dtype, count * dtype.itemsize, views[0][1] if views and views[0] else 0)

    def view(self, storage: Any, offset: Any, sizes: Any, strides: Any, *more: Any) -> Array:
        return self.view_of_type(storage, offset, sizes, strides, None, None, storage.dtype)

    def view_of_type(
        self, storage: Any, offset: Any, sizes: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, *more: Any
    ) -> Array:
        if not isinstance(storage, Storage):
            raise CheckpointError('it is damaged: there is a tensor without a storage')
        return Array(dtype, sizes, lambda: self.fetch(storage), False, strides, offset + storage.offset)


TYPES = {str(each): each for each in vars(torch).values() if isinstance(each, torch.dtype)}
STORAGES = {
    **{'Float': torch.float32, 'Double': torch.float64, 'Half': torch.float16, 'BFloat16': torch.bfloat16},
    **{'Long': torch.int64, 'Int': torch.int32, 'Short': torch.int16, 'Char': torch.int8, 'Byte': torch.uint8},
    **{'Bool': torch.bool, 'ComplexFloat': torch.complex64, 'ComplexDouble': torch.complex128},
    **{'QInt8': torch.qint8, 'QUInt8': torch.quint8, 'QInt32': torch.qint32},
    **{'QUInt4x2': torch.quint4x2, 'QUInt2x4': torch.quint2x4},
}
# Tensors that are no plain ones. They may be beside the network.
WITHOUT_VALUES = (
    *('sparse_tensor', 'sparse_csr_tensor', 'qtensor', 'meta_tensor_no_storage', 'nested_tensor', 'wrapper_subclass'),
    'device_tensor_from_numpy',
)


def first_argument(value: Any, *more: Any) -> Any:
    return value


def allowed_by_user() -> list[str]:
    """Names that the user has told torch to allow. What they are is left out; the list stays as it is."""
    given = torch.serialization.get_safe_globals()
    return [each[1] if isinstance(each, tuple) else f'{each.__module__}.{each.__qualname__}' for each in given]
