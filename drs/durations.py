"""Lengths of time as a person writes them."""


def duration(seconds: float, *, rough: bool = False) -> str:
    """Write a time as ``1 h 02 min``, ``12 min 05 s`` or ``8 s``; ``rough`` leaves out the seconds of minutes."""
    if rough and seconds >= 60:
        seconds = 60 * round(seconds / 60)
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return (f"{minutes} min" if rough else f"{minutes} min {rest:02d} s") if minutes else f"{rest} s"
