"""A command as bash arrays in Megatron's look, or as one line."""

from __future__ import annotations

import shlex
import textwrap

from mcore_longctx.launch.args.flags import Command, Expansion, Flag

__all__ = ["as_arrays", "as_line"]

_WIDTH = 118


def as_arrays(command: Command) -> str:
    """Bash: a comment that says what differs, the arrays, and the command over them as a comment. Sourcing it starts nothing."""
    lines = _comment(command.title) + _comment(f"Accepted by {command.accepted_by}.")
    if command.differences:
        lines += ["#", "# Not as in mcore-longctx train:"]
        for one in command.differences:
            lines += _comment(one.what, first="#   - ", then="#     ")
    if command.before:
        lines += ["#", "# Once, before the first start:", *(f"#   {line}" for line in command.before)]
    lines.append("")
    for name, value, why in command.environment:
        lines += [*_comment(why), f"export {name}={shlex.quote(value)}", ""]
    for name, flags in command.arrays:
        lines.append(f"{name}=(")
        for flag in flags:
            lines += _comment(flag.why, first="    # ", then="    # ") if flag.why else []
            lines.append(f"    {_words(flag)}")
        lines += [")", ""]
    first, *others = (f'"${{{name}[@]}}"' for name, _ in command.arrays)
    with_launcher = command.arrays[0][0] == "DISTRIBUTED_ARGS"
    parts = [*command.launcher, first, *command.program] if with_launcher else [*command.launcher, *command.program, first]
    lines.append("# " + " \\\n#     ".join([" ".join(parts), *others]))
    return "\n".join(lines) + "\n"


def as_line(command: Command) -> str:
    """The whole command in one line, quoted for a shell."""
    words = [f"{name}={shlex.quote(value)}" for name, value, _ in command.environment]
    words += [shlex.quote(word) for word in command.launcher]
    started = False
    for name, flags in command.arrays:
        if name != "DISTRIBUTED_ARGS" and not started:
            words += [shlex.quote(word) for word in command.program]
            started = True
        words += [_words(flag) for flag in flags]
    return " ".join(words) + "\n"


def _words(flag: Flag) -> str:
    """`--name value`, or `name=value` where the name says so by ending in an equals sign."""
    values = [_quoted(value) for value in flag.values]
    return flag.name + " ".join(values) if flag.name.endswith("=") else " ".join([flag.name, *values])


def _quoted(value: str) -> str:
    return f'"{value}"' if isinstance(value, Expansion) else shlex.quote(value)


def _comment(text: str, *, first: str = "# ", then: str = "# ") -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent=first, subsequent_indent=then, break_long_words=False, break_on_hyphens=False
    )
