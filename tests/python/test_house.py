"""The shape of the source: sizes of files and functions, who may include whom, no cycles.

Every check is a function from {path: text} to a list of complaints. It runs on the tree, where it
must find nothing, and on a tree with one thing broken, where it must find exactly that.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
MOST_FILE_LINES, MOST_FUNCTION_LINES = 400, 80

# A folder may include those before it, never one after it or beside it. cpp/include, the public
# headers, may be included by all.
ROOMS = (
    ("cpp/include",),
    ("cpp/base",),
    ("cpp/checkpoint",),
    ("cpp/text",),
    ("cpp/weights",),
    ("cpp/sparsity",),
    ("cpp/backend",),
    ("cpp/model",),
    ("cpp/cpu", "cuda"),
    ("cpp/engine",),
    ("python", "cpp/examples"),
)
CPP_SUFFIXES = {".h", ".cpp", ".cu"}


def product_sources() -> dict[str, str]:
    """Product code by path relative to the root. Generated tables (.inc) are not looked at."""
    files = [
        path
        for folder in ("cpp", "cuda", "python")
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in CPP_SUFFIXES | {".py"}
    ]
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in files}


def cpp_only(sources: dict[str, str]) -> dict[str, str]:
    return {path: text for path, text in sources.items() if Path(path).suffix in CPP_SUFFIXES}


# ---- sizes ---------------------------------------------------------------------------------------


def long_files(sources: dict[str, str]) -> list[str]:
    sizes = {path: text.count("\n") for path, text in sources.items()}
    return [f"{path}: {n} lines" for path, n in sizes.items() if n > MOST_FILE_LINES]


def blank_out(text: str) -> str:
    """C++ without comments, literals and preprocessor lines; every line keeps its number."""
    token = re.compile(
        r'R"(?P<mark>[^(\s]*)\(.*?\)(?P=mark)"'
        r"|//[^\n]*|/\*.*?\*/"
        r'|"(?:\\.|[^"\\\n])*"'
        r"|(?<!\w)'(?:\\.|[^'\\\n])+'"
        r"|^[ \t]*#(?:\\\n|[^\n])*",
        re.DOTALL | re.MULTILINE,
    )
    return token.sub(lambda match: "\n" * match[0].count("\n"), text)


def cpp_functions(text: str) -> list[tuple[str, int]]:
    """Name and number of lines of every function. Relies on clang-format: a block's brace follows a
    space, a braced initialiser's does not."""
    text = blank_out(text)
    text = re.sub(r"\[\[.*?\]\]|\b(alignas|__launch_bounds__)\([^)]*\)", "", text)
    functions: list[tuple[str, int]] = []
    blocks: list[tuple[str, str, int]] = []  # those open: kind, name, first line
    head_begin, kind = 0, ""  # head: the text before a brace
    for match in re.finditer(r"[{};]", text):
        at, head = match.start(), text[head_begin : match.start()]
        if match[0] == "{":
            kind = "block"
            if all(outer == "scope" for outer, _, _ in blocks):
                if "(" in head:
                    kind = "function" if head[-1].isspace() else "initialiser"
                elif re.search(r"\b(namespace|struct|class|union|enum|extern)\b", head):
                    kind = "scope"
            name = re.search(r"([\w~:]+|operator[^\w\s]+)\s*\(", head)
            first_line = text.count("\n", 0, at - len(head.lstrip())) + 1
            blocks.append((kind, name[1] if name else "", first_line))
        elif match[0] == "}":
            kind, name, first_line = blocks.pop()
            if kind == "function":
                functions.append((name, text.count("\n", 0, at) + 2 - first_line))
        else:
            kind = blocks[-1][0] if blocks else ""
        if kind != "initialiser":  # after which the head goes on
            head_begin = at + 1
    return functions


def python_functions(text: str) -> list[tuple[str, int]]:
    return [
        (node.name, node.end_lineno - node.lineno + 1)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]


def long_functions(sources: dict[str, str]) -> list[str]:
    return [
        f"{path}: {name}() has {lines} lines"
        for path, text in sources.items()
        for name, lines in (python_functions if path.endswith(".py") else cpp_functions)(text)
        if lines > MOST_FUNCTION_LINES
    ]


# ---- who includes or imports whom ----------------------------------------------------------------


def includes(sources: dict[str, str]) -> dict[str, set[str]]:
    """The project's own headers that each C++ file includes."""
    sources = cpp_only(sources)
    found: dict[str, set[str]] = {}
    for path, text in sources.items():
        names = re.findall(r'^\s*#\s*include\s+(?:"([^"]+)"|<(tda/[^>]+)>)', text, re.MULTILINE)
        folders = (str(Path(path).parent), "cpp", "cpp/include", ".")
        found[path] = {
            target
            for pair in names
            for folder in folders
            if (target := (Path(folder) / (pair[0] or pair[1])).as_posix()) in sources
        }
    return found


def room_of(path: str) -> int:
    for level, rooms in enumerate(ROOMS):
        if any(path.startswith(room + "/") for room in rooms):
            return level
    raise AssertionError(f"{path} is in none of the rooms")


def upward_includes(sources: dict[str, str]) -> list[str]:
    def folder(path: str) -> str:
        return next(room for room in ROOMS[room_of(path)] if path.startswith(room + "/"))

    return [
        f"{path} includes {target}"
        for path, targets in includes(sources).items()
        for target in sorted(targets)
        if folder(path) != folder(target) and room_of(target) >= room_of(path)
    ]


def imports(sources: dict[str, str]) -> dict[str, set[str]]:
    """The package's own modules that each of its modules imports, anywhere in it; those of a
    package inside it as "server.app", itself as "server.__init__"."""
    modules = {
        path.removeprefix("python/tdaengine/").removesuffix(".py").replace("/", "."): text
        for path, text in sources.items()
        if path.startswith("python/tdaengine/") and path.endswith(".py")
    }
    found: dict[str, set[str]] = {}
    for module, text in modules.items():
        names: set[str] = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                outer = module.split(".")[: -node.level]
                target = [*outer, *(node.module.split(".") if node.module else [])]
                # What is imported may be a module itself, or stand in one or in an __init__.
                for name in {alias.name for alias in node.names} - {"_native"}:
                    places = ([*target, name], target, [*target, "__init__"])
                    known = [".".join(parts) for parts in places if ".".join(parts) in modules]
                    names.update(known[:1])
            elif isinstance(node, ast.ImportFrom) and node.module == "tdaengine":
                names.add("__init__")
        found[module] = names & modules.keys()
    return found


def cycles(graph: dict[str, set[str]]) -> list[str]:
    """The first cycle found from every node that is in one, each cycle once."""
    found: dict[frozenset[str], str] = {}
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> None:
        if node in path:
            cycle = path[path.index(node) :]
            found.setdefault(frozenset(cycle), " -> ".join([*cycle, node]))
        elif node not in done:
            for target in sorted(graph[node]):
                visit(target, [*path, node])
            done.add(node)

    for node in graph:
        visit(node, [])
    return list(found.values())


# ---- the tree, and the same with one thing broken ------------------------------------------------

SOURCES = product_sources()


def test_no_file_is_too_long():
    assert long_files(SOURCES) == []
    longer = SOURCES | {"cpp/base/size.h": "\n" * (MOST_FILE_LINES + 1)}
    assert "cpp/base/size.h: 401 lines" in long_files(longer)


def test_no_function_is_too_long():
    assert long_functions(SOURCES) == []


def test_the_length_of_a_function_is_seen():
    body = "  if (x) { y(); }\n" * (MOST_FUNCTION_LINES - 2)
    cpp = "namespace tda {{\nstruct A {{\n  A(int n) : a{{n}}, b(n) {{\n{body}}}\n}};\n}}\n"
    fits, too_long = cpp.format(body=body), cpp.format(body=body + "  // {\n")
    assert cpp_functions(fits) == [("A", 80)]
    assert long_functions({"cpp/base/a.h": fits}) == []
    assert long_functions({"cpp/base/a.h": too_long}) == ["cpp/base/a.h: A() has 81 lines"]
    python = "class A:\n    def f(self):\n" + "        x = 1\n" * 80
    assert long_functions({"python/tdaengine/a.py": python}) == [
        "python/tdaengine/a.py: f() has 81 lines"
    ]
    names = {name for path, text in cpp_only(SOURCES).items() for name, _ in cpp_functions(text)}
    assert {"attend_kernel", "load_model", "Checkpoint::Checkpoint", "main"} <= names


def test_no_room_includes_a_higher_one():
    assert upward_includes(SOURCES) == []
    for path, line, found in (
        ("cpp/base/size.h", '#include "weights/model.h"', "cpp/weights/model.h"),
        ("cpp/cpu/ffn.cpp", '#include "cuda/ffn.h"', "cuda/ffn.h"),
        ("cuda/ffn.cu", '#include "cpu/cpu_backend.h"', "cpp/cpu/cpu_backend.h"),
        ("cpp/include/tda/types.h", '#include "base/size.h"', "cpp/base/size.h"),
    ):
        broken = SOURCES | {path: SOURCES[path] + line + "\n"}
        assert upward_includes(broken) == [f"{path} includes {found}"]


def test_no_headers_include_each_other_in_a_circle():
    assert cycles(includes(SOURCES)) == []
    broken = SOURCES | {
        "cpp/base/size.h": SOURCES["cpp/base/size.h"] + '#include "base/buffer.h"\n'
    }
    assert cycles(includes(broken)) == ["cpp/base/buffer.h -> cpp/base/size.h -> cpp/base/buffer.h"]


def test_no_modules_import_each_other_in_a_circle():
    assert cycles(imports(SOURCES)) == []
    a, b = "python/tdaengine/a.py", "python/tdaengine/b.py"
    broken = {a: "from .b import x\n", b: "def f():\n    from . import a\n"}
    assert cycles(imports(broken)) == ["a -> b -> a"]
    inner = "python/tdaengine/inner/c.py"
    broken = {a: "from .inner.c import x\n", inner: "from ..a import y\n"}
    assert cycles(imports(broken)) == ["a -> inner.c -> a"]
