"""
What the fields of parsed JSON may hold. A description is {name: check}, and a check is a function
of a value. A file may come from a stranger or a damaged disk: fits() is asked once, where it is
read, before anything else sees it.
"""


def is_number(value):
    """Whether a parsed value is a number that a page and a picture can show."""
    most = {float: 1e40, int: 1 << 53}.get(type(value), 0)
    return most > 0 and -most < value < most  # NaN compares as False


def is_size(value):
    return is_number(value) and value >= 0


def is_count(value):
    return type(value) is int and 0 <= value < 1 << 53  # exact in a browser too


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
    """A check of objects that have printable names and values that all pass `check`."""
    return lambda value: (
        type(value) is dict and all(map(is_text, value)) and all(map(check, value.values()))
    )


def list_of(check):
    """A check of lists of values that all pass `check`."""
    return lambda value: type(value) is list and all(map(check, value))


def fits(value, fields, optional=()):
    """
    Whether a parsed object has all of `fields`, {name: check}, with values that pass, and of those
    in `optional`, a dict likewise, none that does not.
    """
    if type(value) is not dict or not fields.keys() <= value.keys():
        return False
    checks = {**fields, **dict(optional)}
    return all(check(value[name]) for name, check in checks.items() if name in value)
