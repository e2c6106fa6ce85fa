"""The command line: `dwconv optimize`, `explain`, `bench`, `env`. torch is imported only by those that need it."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import env
from .bench.suites import DIRECTIONS, FEW, LAYOUTS, SUITES, load_suite
from .bench.timing import ROUNDS
from .device import PRESETS, preset
from .errors import DepthwiseError
from .problem import ACTIVATIONS, DTYPE_BYTES, DepthwiseProblem, Epilogue, expand, padding_pairs
from .version import __version__

USER_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, as every other error here."""

    def error(self, message: str) -> NoReturn:
        raise DepthwiseError(f"{message}: see `{self.prog} --help`")


def main(argv: Sequence[str] | None = None, console: Console | None = None) -> int:
    """Runs one command and returns the exit code: 0; 1 if a result is wrong; 2 if a request can't be served.

    Args:
        argv: the arguments; default those of this process.
        console: where results go; default the terminal.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    console = Console(highlight=False) if console is None else console
    debug = "--debug" in arguments
    try:
        return _run(_parser().parse_args([word for word in arguments if word != "--debug"]), arguments, console)
    except DepthwiseError as error:
        if debug:
            raise
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[red]dwconv: {escape(str(error))}[/red]")
        return USER_ERROR
    except KeyboardInterrupt:
        if debug:
            raise
        return INTERRUPTED


def _run(options: argparse.Namespace, arguments: Sequence[str], console: Console) -> int:
    if options.command == "optimize":
        from . import optimize

        return int(
            optimize.run(
                options.model,
                out=options.output,
                arch=options.arch,
                bench=not options.no_bench,
                json_path=options.json,
                console=console,
            )
        )
    if options.command == "explain":
        return _explain(options, console)
    if options.command == "env":
        return _env(options, console)
    return _bench(options, arguments, console)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="dwconv",
        description="Depthwise convolution in PyTorch as fast as the memory of the GPU allows.",
        epilog="--debug, anywhere, shows tracebacks.",
    )
    parser.add_argument("--version", action="version", version=f"dwconv {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    _add_optimize(commands)
    _add_explain(commands)
    _add_bench(commands)
    about = "print versions, devices, the kernel cache, and every environment variable"
    command = commands.add_parser("env", help=about, description=about)
    command.add_argument("--json", action="store_true", help="print JSON")
    return parser


_Commands = argparse._SubParsersAction  # argparse gives this type no public name


def _add_optimize(commands: _Commands[_Parser]) -> None:
    about = "write MODEL.py again with faster depthwise layers, verify and time it"
    command = commands.add_parser("optimize", help=about, description=about)
    command.add_argument("model", metavar="MODEL.py", type=Path, help="defines Model, get_inputs and get_init_inputs")
    command.add_argument("-o", "--output", metavar="OUT.py", type=Path, help="default: MODEL_dwconv.py, here")
    command.add_argument("--arch", help=f"{', '.join(PRESETS)}; default: this machine's GPU, or sm_90")
    command.add_argument("--no-bench", action="store_true", help="verify only")
    command.add_argument("--json", metavar="FILE", type=Path, help="write all figures")


def _add_explain(commands: _Commands[_Parser]) -> None:
    about = "show what a problem costs at least, every candidate plan, and what the chosen kernel takes"
    command = commands.add_parser(
        "explain",
        help=about,
        description=about,
        epilog="Numbers: 3, or one for each spatial dimension: 3,7. Needs no GPU.",
    )
    command.add_argument("--input", required=True, metavar="N,C,...", help="the input's shape, as 16,64,512,512")
    command.add_argument("--kernel", required=True, metavar="K", help="the filter: 3, or 3,7")
    command.add_argument("--stride", default="1", metavar="S", help="default 1")
    command.add_argument(
        "--padding", default="0", metavar="P", help="1, or 1,2, or 1:0,2:2 (before:after), same, valid"
    )
    command.add_argument("--dilation", default="1", metavar="D", help="default 1")
    command.add_argument("--multiplier", default="1", metavar="M", help="output channels per input channel; default 1")
    command.add_argument("--bias", action="store_true", help="with a bias")
    command.add_argument("--dtype", default="float32", help=", ".join(DTYPE_BYTES))
    command.add_argument("--layout", default="channels_first", choices=LAYOUTS, help="default channels_first")
    command.add_argument("--activation", metavar="NAME", help=", ".join(ACTIVATIONS))
    for name, about in (("scale", "a factor"), ("shift", "a summand")):
        command.add_argument(f"--{name}", action="store_true", help=f"with {about} for each output channel")
    command.add_argument("--residual", action="store_true", help="with a tensor added to the result")
    command.add_argument("--arch", default="sm_90", help=f"{', '.join(PRESETS)}; default sm_90")
    command.add_argument("--variant", help="this variant's plans only")
    command.add_argument("--json", action="store_true", help="print JSON")


def _add_bench(commands: _Commands[_Parser]) -> None:
    about = "time dwconv beside PyTorch on this machine's GPU: cold L2, interleaved rounds, checked results"
    command = commands.add_parser("bench", help=about, description=about)
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("--suite", choices=SUITES, help="kernelbench: five large problems; models: 43 layers of networks")
    what.add_argument("--host", action="store_true", help="the host's time for a call, and for a first call")
    what.add_argument("--merge", nargs="+", metavar="FILE", type=Path, help="make one report of several JSON files")
    command.add_argument("--list", action="store_true", help="list the suite's cases and stop")
    command.add_argument(
        "--case", action="append", default=[], metavar="NAME", help="part of a case's name; repeatable"
    )
    command.add_argument("--direction", default="forward", choices=(*DIRECTIONS, "all"), help="default forward")
    command.add_argument("--dtype", action="append", default=[], metavar="DTYPE", help="default: all the suite lists")
    command.add_argument("--layout", action="append", default=[], choices=LAYOUTS, help="default: all the suite lists")
    command.add_argument(
        "--contender",
        action="append",
        default=[],
        metavar="NAME",
        help=f"repeatable; default: eager, compile, dwconv, and for up to {FEW} problems every variant",
    )
    command.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="time torch.compile too; it takes seconds for each problem",
    )
    command.add_argument(
        "--shard", default="1/1", metavar="I/N", help="this part of the suite's problems only; see --merge"
    )
    command.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help=f"samples of each; default {ROUNDS}")
    command.add_argument("--json", metavar="FILE", type=Path, help="write all figures")
    command.add_argument("--markdown", metavar="FILE", type=Path, help="write the report as Markdown")


def integers(option: str, text: str, example: str) -> tuple[int, ...]:
    """Whole numbers with commas between them.

    Raises:
        DepthwiseError: something else.

    >>> integers("--kernel", "3,7", "3,7")
    (3, 7)
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise DepthwiseError(
            f"{option} {text!r} is not understood: give whole numbers with commas between them, as {example}"
        ) from None


def problem_of(options: argparse.Namespace) -> DepthwiseProblem:
    """The problem that `dwconv explain`'s options describe.

    Raises:
        DepthwiseError: they describe none.
    """
    shape = integers("--input", options.input, "16,64,512,512")
    dims = len(shape) - 2
    if dims not in (1, 2, 3):
        raise DepthwiseError(
            f"--input {options.input} has {len(shape)} numbers: give N,C and one to three sizes, as 16,64,512,512"
        )
    size = shape[2:]
    taps = expand("--kernel", integers("--kernel", options.kernel, "3 or 3,7"), dims)
    stride = expand("--stride", integers("--stride", options.stride, "2 or 2,1"), dims)
    dilation = expand("--dilation", integers("--dilation", options.dilation, "2 or 2,1"), dims)
    multiplier = integers("--multiplier", options.multiplier, "2")
    if len(multiplier) != 1:
        raise DepthwiseError(f"--multiplier {options.multiplier} must be one number")
    return DepthwiseProblem(
        batch=shape[0],
        channels=shape[1],
        size=size,
        filter=taps,
        stride=stride,
        padding=padding_of(options.padding, taps, stride, dilation),
        dilation=dilation,
        multiplier=multiplier[0],
        bias=options.bias,
        dtype=options.dtype,
        layout=options.layout,
        epilogue=Epilogue(options.activation, options.scale, options.shift, options.residual),
    )


def padding_of(
    text: str, taps: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    """Zeros (before, after) each dimension: "1", "1,2", "1:0,2:2", "same" or "valid".

    Raises:
        DepthwiseError: something else, or "same" with a stride.

    >>> padding_of("same", (3, 4), (1, 1), (1, 1)), padding_of("2:0,1", (3, 3), (1, 1), (1, 1))
    (((1, 1), (1, 2)), ((2, 0), (1, 1)))
    """
    if text in ("same", "valid"):
        return padding_pairs(text, taps, stride, dilation)
    example = "1 or 1,2 or 1:0,2:2, or same or valid"
    pairs = [integers("--padding", part.replace(":", ","), example) for part in text.split(",")]
    if len(pairs) == 1:
        pairs *= len(taps)
    if len(pairs) != len(taps) or any(len(pair) > 2 for pair in pairs):
        raise DepthwiseError(f"--padding {text} doesn't fit {len(taps)} spatial dimensions: give {example}")
    return tuple((pair[0], pair[-1]) for pair in pairs)


def shard_of(text: str) -> tuple[int, int]:
    """Part and number of parts, of "2/5".

    Raises:
        DepthwiseError: something else.
    """
    parts = integers("--shard", text.replace("/", ","), "2/5, the second of five parts")
    if len(parts) != 2:
        raise DepthwiseError(f"--shard {text} is not understood: give part and number of parts, as 2/5")
    return parts[0], parts[1]


def _explain(options: argparse.Namespace, console: Console) -> int:
    from .explain import explain, print_explanation, to_json

    found = explain(problem_of(options), preset(options.arch), options.variant)
    if options.json:
        print_json(to_json(found), console)
    else:
        print_explanation(found, console)
    return 0


def _bench(options: argparse.Namespace, arguments: Sequence[str], console: Console) -> int:
    command = shlex.join(["dwconv", *arguments])
    if options.host:
        from .bench.host import run_host

        return run_host(console, command, options.json)
    if options.list:
        for case in load_suite(options.suite):
            problem = case.problem(case.dtypes[0], case.layouts[0], "forward")
            console.print(f"{case.name}: {problem} ({case.source})", markup=False, soft_wrap=True)
        return 0
    from .bench.run import Settings, merge, run

    if options.merge:
        return merge(options.merge, options.json, options.markdown, console)
    settings = Settings(
        suite=options.suite,
        names=tuple(options.case),
        dtypes=tuple(options.dtype),
        layouts=tuple(options.layout),
        directions=DIRECTIONS if options.direction == "all" else (options.direction,),
        contenders=tuple(options.contender),
        compile=options.compile,
        shard=shard_of(options.shard),
        rounds=options.rounds,
        json_path=options.json,
        markdown_path=options.markdown,
    )
    return run(settings, console, command)


def _env(options: argparse.Namespace, console: Console) -> int:
    from .cache import default_cache
    from .versions import devices, versions

    cache = default_cache()
    entries = sum(1 for entry in cache.folder.iterdir() if entry.suffix != ".tmp") if cache.folder.is_dir() else 0
    found, gpus, rows = versions(), devices(), env.describe()
    if options.json:
        content = {
            "versions": found,
            "devices": gpus,
            "cache": {"folder": str(cache.root), "bytes": cache.size(), "entries": entries, "limit": cache.limit_bytes},
            "variables": {row.name: {"value": row.value, "default": row.default} for row in rows},
        }
        print_json(content, console)
        return 0
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, version in found.items():
        table.add_row(name, escape(version))
    for number, gpu in enumerate(gpus):
        table.add_row(f"device {number}", escape(gpu))
    if not gpus:
        table.add_row("devices", "torch finds no GPU")
    kept = f"{entries} kernels, {cache.size() / 2**20:.1f} of {cache.limit_bytes >> 20} MiB"
    table.add_row("kernel cache", escape(f"{cache.root}: {kept}"))
    console.print(table)
    console.print()
    variables = Table(title="environment variables", title_justify="left", title_style="bold")
    variables.add_column("name", no_wrap=True)
    for heading in ("value", "meaning"):
        variables.add_column(heading, overflow="fold")
    for row in rows:
        value = escape(row.value) if row.value is not None else f"[dim]{escape(row.default) or 'not set'}[/dim]"
        variables.add_row(row.name, value, escape(row.sentence))
    console.print(variables)
    return 0


def print_json(content: object, console: Console) -> None:
    """JSON, neither wrapped nor coloured, so that it can be piped."""
    console.print(
        json.dumps(content, indent=1, ensure_ascii=False), markup=False, highlight=False, soft_wrap=True, emoji=False
    )
