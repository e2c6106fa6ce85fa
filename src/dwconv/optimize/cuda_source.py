"""Writes the CUDA and the C++ source of an exported file, and the table that its layers look kernels up by."""

from __future__ import annotations

import hashlib
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..errors import DepthwiseError
from ..plan import Constants
from ..sources import kernel_source, without_includes
from .find import Configuration
from .launches import host_text, launch_texts
from .specialise import Specialisation

_EXTENSION = "dwconv_extension"
_PROBLEM_CONFIG = "config.cuh"  # of every kernel file; here the specialisations' configurations stand for it
_SIZES_OF = """\
template <class C>
dwconv::Sizes sizes_of(const Call& call) {
    const long long plane = call.in_h * call.in_w, filters = call.channels * C::kMultiplier;
    return {call.images * filters, filters, 1, call.in_h, call.in_w, 1, call.out_h, call.out_w,
            call.channels * plane, plane, 0, call.in_w, 1};
}"""


@dataclass(frozen=True)
class ExtensionSource:
    """What is compiled when an exported file is loaded.

    Attributes:
        name: of the extension; it holds a hash of both sources, so that a build cache never mixes two.
        cuda: kernels, their launches; needs no torch.
        cpp: the operator.
        configurations: Python lines: what a layer was built with -> its number.
    """

    name: str
    cuda: str
    cpp: str
    configurations: str


def extension_source(made: Sequence[Specialisation]) -> ExtensionSource:
    """Sources of an extension with these kernels."""
    numbered = list(dict.fromkeys(s.configuration for s in made))
    cuda = _cuda(made)
    cpp = _filled(
        host_text("binding.cpp"),
        CALL=host_text("call.h").strip(),
        LAUNCHES=", ".join(f"{s.name}(const Call& call)" for s in made),
        CONFIGURATIONS="\n".join(f"    {_cpp_configuration(c)},  // {_layers_of(made, c)}" for c in numbered),
        KERNELS="\n".join(f"    {_cpp_kernel(s, numbered.index(s.configuration))}," for s in made),
    )
    raw = {use.layer.layer.configuration: numbered.index(s.configuration) for s in made for use in s.uses}
    name = "depthwise_" + hashlib.sha256((cuda + cpp).encode()).hexdigest()[:12]
    return ExtensionSource(
        name,
        cuda.replace(_EXTENSION, name).strip(),
        cpp.replace(_EXTENSION, name).strip(),
        "\n".join(f"    {key!r}: {number}," for key, number in raw.items()),
    )


def _filled(text: str, **parts: str) -> str:
    for name, part in parts.items():
        text = text.replace(f"/*{name}*/", part.strip())
    return text


def _cuda(made: Sequence[Specialisation]) -> str:
    """Shared templates once, each variant's once, then the specialisations, all with internal linkage."""
    stems = list(dict.fromkeys(s.plan.variant for s in made))
    parts: dict[str, str] = {}
    for stem in stems:
        for name, text in kernel_source(stem).includes:
            if name != _PROBLEM_CONFIG:
                parts.setdefault(name, without_includes(text))
    sections = [*parts.values(), *(kernel_source(stem).template for stem in stems)]
    sections += launch_texts(stems)
    sections.append(
        "// ---- the kernels of this model: the templates above, with everything that is known filled in ----\n\n"
        f"namespace {_EXTENSION} {{\n\n{host_text('call.h').strip()}\n\n{_SIZES_OF}"
    )
    sections += [_specialisation(s) for s in made]
    sections.append(f"}}  // namespace {_EXTENSION}")
    return "\n\n".join(section.strip() for section in sections) + "\n"


def _specialisation(s: Specialisation) -> str:
    """Config, kernel and launch of one specialisation."""
    stem = s.plan.variant
    tiling = "".join(word.capitalize() for word in stem.split("_")) + "Tiling"
    config, kernel = f"{s.camel}Config", f"{s.name}_kernel"
    bounds = re.search(r"__launch_bounds__\(([^)]*)\)", kernel_source(stem).border)
    arguments = bounds.group(1).replace("Config::", f"{config}::") if bounds else ""
    launch_bounds = f"__launch_bounds__({arguments})" if arguments else ""
    return f"""\
{_comment(s)}
namespace {{
{_config(s, config)}

__global__ void {launch_bounds}
{kernel}(const dwconv::Tensors<float> tensors,
{" " * len(kernel)} const dwconv::Sizes sizes, const dwconv::{tiling} tiling) {{
    dwconv::{stem}<{config}>(tensors, sizes, tiling);
}}
}}  // namespace

bool {s.name}(const Call& call) {{
    const dwconv::Tensors<float> tensors = {{call.x, call.weight, call.bias, call.y}};
    const dwconv::Sizes sizes = sizes_of<{config}>(call);
    const auto launch = dwconv::{stem}_launch<{config}>(sizes, call.x);
    const bool possible = launch.possible && dwconv::may_share({kernel}, launch.shared_bytes);
    if (possible)
        {kernel}<<<launch.grid, launch.block, launch.shared_bytes, call.stream>>>(
            tensors, sizes, launch.tiling);
    return possible;
}}"""


def _config(s: Specialisation, name: str) -> str:
    """A struct of everything that is known at compile time: the problem's constants, then the tile's."""
    return f"struct {name} {{\n{config_members(s.plan.variant, s.plan.constants)}\n}};"


def config_members(stem: str, constants: Constants) -> str:
    """The members of `ProblemConfig` and of the variant's own `Config`, their macros replaced by values."""
    source = kernel_source(stem)
    texts = (dict(source.includes).get(_PROBLEM_CONFIG, ""), source.border)
    patterns = (r"^struct ProblemConfig \{\n(.*?)^\};", r"^struct Config : ProblemConfig \{\n(.*?)^\};")
    values = {f"DWCONV_{key}": str(value) for key, value in constants}
    lines = []
    for text, pattern in zip(texts, patterns, strict=True):
        found = re.search(pattern, text, re.MULTILINE | re.DOTALL)
        if found is None:
            raise DepthwiseError(
                f'kernels/{stem}.cuh must have `#include "{_PROBLEM_CONFIG}"` and a `struct Config : ProblemConfig '
                "{...};` below its border"
            )
        for line in found[1].rstrip().splitlines():
            line = re.sub(r"\bDWCONV_\w+", lambda match: values[match[0]], line)
            if " bool " in line:
                line = re.sub(r"= 0\b", "= false", re.sub(r"= 1\b", "= true", line))
            lines.append(line)
    return "\n".join(lines)


def _comment(s: Specialisation) -> str:
    """Which layers a kernel serves, what they compute, and the tile in words."""
    problems = dict.fromkeys(str(use.problem) for use in s.uses)
    lines = _wrapped(f"{s.name}: {_listed(s.layers)}")
    lines += [f"//   {problem}" for problem in problems]
    lines += _wrapped(f"tile: {s.plan.tile}", "  ")
    return "\n".join(lines)


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, 110, initial_indent=f"// {indent}", subsequent_indent=f"// {indent}    ")


def _listed(names: Iterable[str], most: int = 12) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _layers_of(made: Sequence[Specialisation], configuration: Configuration) -> str:
    return _listed(dict.fromkeys(n for s in made if s.configuration == configuration for n in s.layers), 6)


def _cpp_configuration(configuration: Configuration) -> str:
    *pairs, multiplier, bias = configuration
    assert all(isinstance(pair, tuple) for pair in pairs)
    written = ", ".join("{" + ", ".join(map(str, pair)) + "}" for pair in pairs if isinstance(pair, tuple))
    return f"{{{written}, {multiplier}, {'true' if bias else 'false'}}}"


def _cpp_kernel(s: Specialisation, number: int) -> str:
    sizes = ", ".join("{" + ", ".join(map(str, size)) + "}" for size in s.sizes)
    return f"{{{number}, {{{sizes}}}, {s.name}}}"
