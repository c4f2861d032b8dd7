"""Rewrites what of CUDA C++ no header can give a meaning in C++.

    kernel<<<grid, block>>>(n)   ->  cuda_on_cpu::launch("kernel", kernel, LaunchConfig(...), n)
    __shared__ float sums[128];  ->  auto& sums = cuda_on_cpu::shared<float[128], 0>("sums");
    extern __shared__ float a[]; ->  auto* a = cuda_on_cpu::dynamic_shared<float>("a");

Line numbers stay, so that messages point into the source that was prepared.
"""

from __future__ import annotations

import re

_NO_CODE = re.compile(
    r"""//[^\n]* | /\*.*?\*/ | "(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])'""", re.DOTALL | re.VERBOSE
)
_SHARED = re.compile(
    r"""(?P<extern>extern \s+)? __shared__ \s+
    (?:(?:alignas|__align__) \s* \( (?P<align>[^()]+) \) \s*)?
    (?P<type>(?:[^;=\[\]{},<>]|<[^;={}]*>)+?) (?<=[\s>*]) (?P<name>\w+) \s*
    (?P<extents>(?:\[[^\]]*\]\s*)*) ;""",
    re.VERBOSE,
)
_OPENING = {")": "(", "]": "[", ">": "<"}


def prepare(source: str, path: str) -> str:
    """Returns `source`, a CUDA file, as C++; `path` is what the compiler's messages shall name."""
    text = _rewrite_shared(source)
    while (launch := _mask(text).find("<<<")) >= 0:
        text = _rewrite_launch(text, launch)
    return f'#include <cuda_runtime.h>\n#line 1 "{path}"\n{text}'


def _mask(text: str) -> str:
    """Blanks comments and literals, so that code is found at the same positions."""
    return _NO_CODE.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)


def _rewrite_shared(text: str) -> str:
    pieces, end = [], 0
    for number, match in enumerate(_SHARED.finditer(_mask(text))):
        kind, extents = match["type"].strip(), match["extents"].strip()
        if bool(match["extern"]) != (extents == "[]"):
            continue  # and is found below
        alignment = f", {match['align']}" if match["align"] else ""
        made = f"* {{}} = ::cuda_on_cpu::dynamic_shared<{kind}>"
        if not match["extern"]:
            made = f"& {{}} = ::cuda_on_cpu::shared<{kind}{extents}, {number}>"
        pieces += [
            text[end : match.start()],
            f"auto{made.format(match['name'])}",
            f'("{match["name"]}"{alignment});',
            "\n" * match[0].count("\n"),
        ]
        end = match.end()
    text = "".join([*pieces, text[end:]])
    if left := re.search(r"[^\n]*__shared__[^\n]*", _mask(text)):
        raise ValueError(f"this declaration of shared memory is not supported: {left[0].strip()}")
    return text


def _rewrite_launch(text: str, launch: int) -> str:
    code = _mask(text)
    start = _callee_start(code, launch)
    config_end = _config_end(code, launch + 3)
    arguments = re.compile(r"\s*\(").match(code, config_end + 3)
    if not arguments:
        raise ValueError(f"a launch without arguments: {text[start : config_end + 3]}")
    close = _closing(code, arguments.end())
    callee = text[start:launch].strip()
    name = re.sub(r'["\\\s]+', " ", callee)
    gap = text[config_end + 3 : arguments.end() - 1]
    separator = ", " if code[arguments.end() : close].strip() else ""
    return (
        f'{text[:start]}::cuda_on_cpu::launch("{name}", {text[start:launch]}, '
        f"::cuda_on_cpu::LaunchConfig({text[launch + 3 : config_end]})"
        f"{gap}{separator}{text[arguments.end() :]}"
    )


def _callee_start(code: str, end: int) -> int:
    """Walks back over a kernel's name, its template arguments, qualifiers, calls and subscripts."""
    start = len(code[:end].rstrip())
    while True:
        while start > 0 and code[start - 1] in _OPENING:
            start = len(code[: _opening(code, start - 1)].rstrip())
        start = len(re.sub(r"\w+$", "", code[:start]))
        connector = re.search(r"(::|\.|->)$", code[:start])
        if not connector:
            return end - len(code[start:end].lstrip())
        start = connector.start()


def _opening(code: str, close: int) -> int:
    """Returns where the bracket that ends at `close` begins; angles count outside of others."""
    wanted = [_OPENING[code[close]]]
    for at in range(close - 1, -1, -1):
        char = code[at]
        if char == wanted[-1]:
            wanted.pop()
            if not wanted:
                return at
        elif char in ")]" or (char == ">" and wanted[-1] == "<"):
            wanted.append(_OPENING[char])
    raise ValueError("unbalanced brackets before a launch")


def _config_end(code: str, start: int) -> int:
    """Returns where the last `>>>` of the launch stands, outside of any bracket."""
    depth, end = 0, -1
    for at in range(start, len(code)):
        depth += (code[at] in "([{") - (code[at] in ")]}")
        if depth < 0 or (depth == 0 and (code[at] == ";" or code.startswith("<<<", at))):
            break
        if depth == 0 and code.startswith(">>>", at):
            end = at
    if end < 0:
        raise ValueError("a launch without >>>")
    return end


def _closing(code: str, start: int) -> int:
    depth = 1
    for at in range(start, len(code)):
        depth += (code[at] in "([{") - (code[at] in ")]}")
        if depth == 0:
            return at
    raise ValueError("unbalanced parentheses in a launch")
