"""The rules of the source tree that a compiler does not check. Each takes the tree and yields what breaks it."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

# csrc/README.md: a room may include itself and these. The public headers are open to all.
BASE = {"core", "memory", "ops"}
ARROWS = {
    "core": set(),
    "memory": {"core"},
    "ops": {"core", "memory"},
    "sched": {"core", "memory"},
    "backends": BASE,
    "graph": BASE,
    "compile": BASE | {"graph"},
    "model": BASE | {"graph"},
    "peft": BASE | {"graph", "model"},
    "train": BASE | {"graph", "backends", "compile", "model", "peft"},
    "engine": BASE | {"graph", "backends", "compile", "model", "peft", "train", "sched"},
    "include": set(),
    "bindings": set(),
}
CODE = {".h", ".cpp", ".cu", ".cuh"}
MAX_LINES = {".cpp": 600, ".cu": 600, ".cuh": 600, ".h": 300}


@dataclass
class Source:
    """A file of the tree; `path` is relative to the repository."""

    path: Path
    text: str

    @cached_property
    def code(self) -> list[str]:
        """Lines without comments and without the insides of strings; line numbers stay."""
        pattern = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"'

        def blank(match: re.Match[str]) -> str:
            found = match.group()
            line_start = self.text.rfind("\n", 0, match.start()) + 1
            if found.startswith('"'):
                is_include = self.text[line_start : match.start()].lstrip().startswith("#include")
                return found if is_include else '""'
            return "\n" * found.count("\n")

        return re.sub(pattern, blank, self.text, flags=re.DOTALL).split("\n")

    @cached_property
    def includes(self) -> list[tuple[int, str, bool]]:
        """(line, what, in quotes)"""
        found = [(n, re.match(r'\s*#\s*include\s*([<"])([^>"]+)', line)) for n, line in enumerate(self.code, 1)]
        return [(n, match[2], match[1] == '"') for n, match in found if match]

    @property
    def room(self) -> str | None:
        parts = self.path.parts
        return parts[1] if parts[0] == "csrc" and len(parts) > 2 else None

    def matches(self, pattern: str) -> Iterator[tuple[int, str]]:
        for number, line in enumerate(self.code, 1):
            match = re.search(pattern, line)
            if match and not line.lstrip().startswith("#include"):
                yield number, match.group().strip()


@dataclass
class Tree:
    root: Path
    paths: list[Path] = field(default_factory=list)  # relative to root

    @cached_property
    def sources(self) -> list[Source]:
        files = [path for path in self.paths if path.suffix in CODE]
        return [Source(path, (self.root / path).read_text()) for path in files]

    @property
    def csrc(self) -> list[Source]:
        return [source for source in self.sources if source.path.parts[0] == "csrc"]


Violations = Iterator[str]


def _at(source: Source, line: int, message: str) -> str:
    return f"{source.path}:{line}: {message}"


def arrows(tree: Tree) -> Violations:
    """Rooms include only the rooms below them."""
    for source in tree.csrc:
        room = source.room
        if room not in ARROWS:
            yield _at(source, 1, f"csrc/{room} is no room that tests/rules knows")
            continue
        for line, what, quoted in source.includes:
            target = what.split("/")[0]
            if target == "flexcore":
                continue
            if not quoted:
                if room == "include" and not re.fullmatch(r"[a-z_]+", what):
                    yield _at(source, line, f"<{what}> in a public header: the standard library and flexcore/ only")
            elif room == "bindings":
                if not (tree.root / source.path.parent / what).is_file():
                    yield _at(source, line, f'bindings sees flexcore/ and its own files, not "{what}"')
            elif target not in ARROWS or "/" not in what:
                yield _at(source, line, f'"{what}" is not a path from csrc/')
            elif target != room and target not in ARROWS[room]:
                yield _at(source, line, f'{room} may not include {target} ("{what}")')
    for source in tree.sources:
        if source.path.parts[:2] == ("tests", "install"):
            for line, what, quoted in source.includes:
                if quoted or ("/" in what and not what.startswith("flexcore/")):
                    yield _at(source, line, f"tests/install sees <flexcore/...> only, not {what}")


def allocation(tree: Tree) -> Violations:
    """Bytes come from memory/ and the backends' allocators: there the ledger counts them."""
    pattern = (
        r"\bnew\b|\b(malloc|calloc|realloc|aligned_alloc|posix_memalign)\s*\("
        r"|\bcuda(Malloc|HostAlloc|MemCreate)\w*\s*\("
    )
    for source in tree.csrc:
        if source.room == "memory" or (source.room == "backends" and source.path.stem == "allocator"):
            continue
        for line, found in source.matches(pattern):
            yield _at(source, line, f"{found}: only memory/ and backends/*/allocator.* allocate")


def process_survives(tree: Tree) -> Violations:
    """A library does not end its host."""
    for source in tree.csrc:
        for line, found in source.matches(r"(?<![.>\w])(abort|exit|_exit|quick_exit|_Exit|terminate|assert)\s*\("):
            yield _at(source, line, f"{found} ends the process; throw an exception of flexcore/error.h")
        for line, what, _ in source.includes:
            if what in ("cassert", "assert.h"):
                yield _at(source, line, f"<{what}>: checks are require() of core/check.h")


def plain_headers(tree: Tree) -> Violations:
    """A public header means the same in every program."""
    for source in tree.csrc:
        if source.room == "include":
            for line, found in source.matches(r"#\s*(if|ifdef|ifndef|elif|else)\b"):
                yield _at(source, line, f"{found} in a public header")


def sealed_kernels(tree: Tree) -> Violations:
    """Kernel files are compiled once per instruction set; a shared inline function would mix the copies."""
    headers = {"cstdint", "cstddef", "immintrin.h", "arm_neon.h", "type_traits", "utility", "core/bfloat16.h"}
    types = (
        r"u?int(8|16|32|64|ptr)?_t|size_t|ptrdiff_t|(make_)?(integer|index)_sequence|is_same_v|conditional_t|declval"
    )
    for source in tree.csrc:
        if source.path.parts[2:4] != ("cpu", "kernels"):
            continue
        for line, what, _ in source.includes:
            if what not in headers and what != "backends/cpu/isa.h" and not what.startswith("backends/cpu/kernels/"):
                yield _at(source, line, f"{what}: kernels include kernels/ and core/bfloat16.h only")
        for line, found in source.matches(rf"\bstd::(?!({types})\b)\w+"):
            yield _at(source, line, f"{found}: kernels use types of the standard library, no functions")
        for line, found in source.matches(r"#\s*pragma\s+omp\s+parallel|\bomp_\w+"):
            yield _at(source, line, f"{found}: there is one thread pool")


def sizes(tree: Tree) -> Violations:
    """A file that outgrows its reader does two jobs."""
    for source in tree.csrc:
        lines, limit = source.text.count("\n"), MAX_LINES[source.path.suffix]
        if lines > limit:
            yield f"{source.path}: {lines} lines; {limit} at most"


def machine_names(tree: Tree) -> Violations:
    """Nothing in the tree is true of one machine only."""
    pattern = re.compile(
        r"(?<![\w.$}])/([w]ork|[r]oot|[h]ome/\w+|[t]mp/\w+)/|[p]ypi\.org|[p]ythonhosted\.org|[d]eb\.debian\.org|[r]egistry\.npmjs"
    )
    for path in tree.paths:
        data = (tree.root / path).read_bytes()
        if b"\0" in data[:4096]:
            continue
        for line, text in enumerate(data.decode(errors="replace").split("\n"), 1):
            match = pattern.search(text)
            if match:
                yield f"{path}:{line}: names a machine or host: {match.group()}"


RULES: list[Callable[[Tree], Violations]] = [
    arrows,
    allocation,
    process_survives,
    plain_headers,
    sealed_kernels,
    sizes,
    machine_names,
]
