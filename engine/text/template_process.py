"""Renders chat templates in a process of its own, which is bounded: a template comes with a model, and may loop or make
a text of gigabytes in one expression. Run as a script, with the standard library and jinja2 alone.

A line of standard input is a request, answered by a line of standard output, until there are no more of them, or one
took much memory.

In: JSON with template, conversations (of each the template's variables), most_characters, cpu_s, memory_bytes. Out:
JSON with texts, one a conversation; or with error, index where it is of one conversation, and place where the template
fails by itself: what failed in which line, without the words of the error, which may show texts of the conversation.
The kernel ends a process that takes more than cpu_s for a request.

It renders as transformers does: the same sandbox, filters, globals and tags.
"""

import contextlib
import functools
import json
import math
import resource
import sys
import time
import traceback
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

MOST_KEPT_CHARACTERS = 2**24  # of an answer: a longer one, or one beyond a bound, has left much memory behind


class Generation(jinja2.ext.Extension):
    """The tag {% generation %}, which marks what a model said; here it renders what it holds."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_rendered"), [], [], body).set_lineno(line)

    def _rendered(self, caller: jinja2.runtime.Macro) -> str:
        return caller()


def raise_exception(message: str) -> None:
    """Ends a rendering, as templates do for messages that they cannot have."""
    raise jinja2.TemplateError(message)


def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False):
    """JSON without jinja's own escapes of HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def strftime_now(form: str) -> str:
    """The local time now."""
    return datetime.now().strftime(form)


def environment() -> ImmutableSandboxedEnvironment:
    """The environment that templates of transformers expect."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = tojson
    made.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return made


@functools.lru_cache(maxsize=4)
def compiled(source: str) -> jinja2.Template:
    """The template; it is compiled once."""
    return environment().from_string(source)


def render_all(request: dict[str, Any]) -> dict[str, Any]:
    """Renders each conversation; an answer without texts says what is wrong."""
    try:
        template = compiled(request["template"])
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"line {error.lineno}: {error.message}", "place": f"a syntax error in line {error.lineno}"}
    except RecursionError as error:
        return {"error": "is nested too deeply", "place": _place(error)}
    texts, left = [], request["most_characters"]
    for index, variables in enumerate(request["conversations"]):
        try:
            text = ""
            for piece in template.generate(**variables):
                text += piece
                if len(text) > left:
                    return {"index": index, "error": f"more than {request['most_characters']} characters"}
        except MemoryError:
            return {"index": index, "error": f"takes more than {request['memory_bytes']} bytes of memory"}
        except Exception as error:
            if type(error) is jinja2.TemplateError:
                return {"index": index, "error": str(error)}
            return {"index": index, "error": f"{type(error).__name__}: {error}", "place": _place(error)}
        texts.append(text)
        left -= len(text)
    return {"texts": texts}


def _place(error: Exception) -> str:
    """Says what failed, and in which line of the template, which jinja2 puts into the traceback."""
    name, frames = type(error).__name__, traceback.walk_tb(error.__traceback__)
    lines = [line for frame, line in frames if frame.f_code.co_filename == "<template>"]
    return f"{name} in line {lines[-1]}" if lines else name


def set_limits(request: dict[str, Any]) -> None:
    """Bounds what this request may take; the time counts from now, in whole seconds of the process."""
    cpu_s = math.ceil(time.process_time()) + request["cpu_s"]
    for limit, most in ((resource.RLIMIT_AS, request["memory_bytes"]), (resource.RLIMIT_CPU, cpu_s)):
        with contextlib.suppress(ValueError, OSError):  # a lower one holds already
            resource.setrlimit(limit, (most, resource.getrlimit(limit)[1]))


def main() -> None:
    """Answers the requests on standard input."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        request = json.loads(line)
        set_limits(request)
        told = render_all(request)
        answer = json.dumps(told)
        print(answer, flush=True)
        if len(answer) > MOST_KEPT_CHARACTERS or "more than" in told.get("error", ""):
            return


if __name__ == "__main__":
    main()
