"""Writes the CUDA and the C++ source of an exported file, and the table that its layers look kernels up by."""

from __future__ import annotations

import hashlib
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources

from ..errors import DepthwiseError
from ..sources import kernel_source, without_includes
from .find import Configuration
from .specialise import Specialisation

_EXTENSION = "dwconv_extension"
_SIZES_OF = """\
template <class C>
dwconv::Sizes sizes_of(const Call& call) {
    const long long plane = call.in_h * call.in_w, filters = call.channels * C::kMultiplier;
    return {call.images * filters, filters, call.in_h, call.in_w, call.out_h, call.out_w,
            call.channels * plane, plane, call.in_w};
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


def host_text(name: str) -> str:
    """A part that exported files are made of."""
    return (resources.files(__package__) / "host" / name).read_text(encoding="utf-8")


def launch_texts(stems: Iterable[str]) -> list[str]:
    """The host's side of these variants: what all launches share, what their kernels' includes share, and their own."""
    stems = list(stems)
    included = (name for stem in stems for name, _ in kernel_source(stem).includes)
    names = dict.fromkeys(["launch.cuh", *included, *(f"{stem}.cuh" for stem in stems)])
    folder = resources.files(__package__) / "host"
    return [host_text(name) for name in names if (folder / name).is_file()]


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
{kernel}(const float* x, const float* weight, const float* bias, float* y,
{" " * len(kernel)} const dwconv::Sizes sizes, const dwconv::{tiling} tiling) {{
    dwconv::{stem}<{config}>(x, weight, bias, y, sizes, tiling);
}}
}}  // namespace

bool {s.name}(const Call& call) {{
    const dwconv::Sizes sizes = sizes_of<{config}>(call);
    const auto launch = dwconv::{stem}_launch<{config}>(sizes, call.x);
    if (launch.possible)
        {kernel}<<<launch.grid, launch.block, launch.shared_bytes, call.stream>>>(
            call.x, call.weight, call.bias, call.y, sizes, launch.tiling);
    return launch.possible;
}}"""


def _config(s: Specialisation, name: str) -> str:
    """The variant's own `Config`, its macros replaced by their values."""
    found = re.search(r"^struct Config \{.*?^\};", kernel_source(s.plan.variant).border, re.MULTILINE | re.DOTALL)
    if found is None:
        raise DepthwiseError(f"kernels/{s.plan.variant}.cuh has no `struct Config {{...}};` below its border")
    values = dict(s.plan.constants)

    def value(match: re.Match[str]) -> str:
        return str(values[match.group(1)])

    lines = []
    for line in found.group().replace("struct Config {", f"struct {name} {{").splitlines():
        line = re.sub(r"DWCONV_(\w+)", value, line)
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
