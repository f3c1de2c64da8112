"""Comparing ONNX protos: equal but for the presence of proto defaults."""

import copy


def normalised(message):
    """The message without scalar fields that are present but hold their default. A member of a oneof keeps its presence: a
    dimension of 0 is not an unknown one."""
    found = copy.deepcopy(message)
    _normalise(found)
    return found.SerializeToString(deterministic=True)


def _normalise(message):
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if not field.is_repeated else value:
                _normalise(part)
        elif not field.is_repeated and field.containing_oneof is None and value == field.default_value:
            message.ClearField(field.name)


def equal(a, b) -> bool:
    return a.SerializeToString(deterministic=True) == b.SerializeToString(deterministic=True) or normalised(a) == normalised(b)
