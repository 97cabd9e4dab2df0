"""
Checks for the fields of parsed JSON, which may come from a stranger or a damaged disk. A schema is
{name: check}, where a check is a function of a value that returns a bool. Call fits() right after
parsing, before other code uses the object.
"""


def is_number(value):
    """Whether a parsed value is a number that pages and pictures can show."""
    limit = {float: 1e40, int: 1 << 53}.get(type(value), 0)
    return limit > 0 and -limit < value < limit  # NaN compares as False


def is_size(value):
    return is_number(value) and value >= 0


def is_count(value):
    return type(value) is int and 0 <= value < 1 << 53  # exact in a browser


def is_text(value):
    return type(value) is str and len(value) <= 1000 and value.isprintable()


def is_bool(value):
    return type(value) is bool


def is_string(value):
    return type(value) is str


def is_scalar(value):
    return value is None or type(value) in (bool, str) or is_number(value)


def optional(check):
    return lambda value: value is None or check(value)


def each(check):
    """Return a check for objects with printable names and values that all pass `check`."""
    return lambda value: (
        type(value) is dict and all(map(is_text, value)) and all(map(check, value.values()))
    )


def list_of(check):
    """Return a check for lists of values that all pass `check`."""
    return lambda value: type(value) is list and all(map(check, value))


def fits(value, fields, optional=()):
    """
    Whether a parsed object has every field of the schema `fields`, with values that pass. A field
    of the schema `optional` may be missing, but its value must pass too.
    """
    if type(value) is not dict or not fields.keys() <= value.keys():
        return False
    checks = {**fields, **dict(optional)}
    return all(check(value[name]) for name, check in checks.items() if name in value)
