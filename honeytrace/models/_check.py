"""The one check that every model factory makes of its integers."""


def at_least(name: str, value: int, minimum: int) -> None:
    """Raise TypeError unless `value` is an int, ValueError unless it is `minimum` or more."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {name}={value}")
