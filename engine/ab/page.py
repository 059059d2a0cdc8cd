"""A comparison as one HTML file that needs nothing else: style and pictures are in it.

Owns: nothing.  Thread-safety: pure functions.
"""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .summary import chance_words, fewest_runs

RULE = "A side is ahead only if all of its runs are; where ranges overlap, it is a tie."
STYLE = Path(__file__).with_name("page.css")
NO_PLOTS = "matplotlib cannot be imported, so there are tables only; pip install 'vmalloc[bench]'"
MATRIX = (
    *("output_tokens_per_s", "output_tokens_per_cpu_s", "ttft_p50_ms", "tpot_p50_ms"),
    *("itl_p99_ms", "mean_held_bytes", "waste_all", "largest_batch", "allocator_step_us"),
)
Draw = Callable[[dict[str, Any]], str]


def has_plots() -> bool:
    """Whether pictures can be drawn here."""
    return find_spec("matplotlib") is not None


def render_page(summary: dict[str, Any]) -> str:
    """The whole page; without matplotlib it has no pictures, and says so."""
    first, *others = summary["backends"]
    title = f"{first} against {' and '.join(others)}"
    is_drawn = has_plots()
    parts = [
        _header(summary, title),
        "" if is_drawn else f'<p class="banner bad">{escape(NO_PLOTS)}</p>',
        *(_overview(summary, other, is_drawn) for other in others),
        *(_workload(summary, workload, is_drawn) for workload in summary["workloads"]),
        _definitions(summary),
        _origin(summary),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE.read_text()}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


def _header(summary: dict[str, Any], title: str) -> str:
    facts, provenance, equality = summary["facts"], summary["provenance"], summary["equality"]
    machine = f"{provenance['cpu']}, {provenance['cores']} cores"
    model = f"{facts['model']} ({facts['architecture']}, {facts['parameters']:,} parameters)"
    line = f"{model}, {facts['dtype']} on {facts['device']}. {machine}."
    differences = "".join(f"<li>{escape(one)}</li>" for one in equality["differences"])
    ranks = f"<p>{escape(summary['ranks'])}</p>\n" if summary["ranks"] else ""
    loaded = "one model" if summary["ranks"] else "one loaded model"
    sides = "".join(
        f"<li><b>{escape(name)}</b>: {escape(words)}</li>"
        for name, words in summary["backends"].items()
    )
    links = "".join(
        f'<a href="#{_anchor(one)}">{escape(one["name"])}</a>' for one in summary["workloads"]
    )
    return (
        f"<header><h1>{escape(title)}</h1>\n"
        f'<p class="muted">The same seeded requests through each, in turns, over {loaded}. '
        f"{escape(line)}</p>\n<ul>{sides}</ul>\n"
        f"<pre>{escape(provenance['command'])}</pre>\n"
        f'<div class="banner{"" if equality["is_equal"] else " bad"}"><b>'
        f"{escape(equality['words'])}.</b>"
        f"{f'<ul>{differences}</ul>' if differences else ''}</div>\n"
        f"{_warning(summary['stopped'])}{ranks}"
        f"<nav>{links}<a href='#definitions'>definitions</a><a href='#origin'>origin</a></nav>"
        "</header>"
    )


def _overview(summary: dict[str, Any], other: str, is_drawn: bool) -> str:
    first = next(iter(summary["backends"]))
    score = summary["score"][other]
    chips = "".join(
        f'<span class="chip {verdict}">{score[verdict]} {escape(words)}</span>'
        for verdict, words in (
            ("better", f"{first} ahead"),
            ("tie", "ties"),
            ("worse", f"{other} ahead"),
        )
    )
    picture = ""
    if is_drawn:
        from . import plots

        words = (
            f"Right of the line {first} is ahead. Lines span the rounds; hollow grey points are "
            "ties."
        )
        picture = _figure(plots.overview(summary, other), words, is_wide=True)
    return (
        f"<section><h2>{escape(first)} / {escape(other)}</h2>\n"
        f'<div class="score">{chips}<span class="muted small">over all figures of '
        f"{len(summary['workloads'])} workloads</span></div>\n"
        '<p class="muted small">Medians of the ratios of each round, their range below. For times, '
        f"memory and waste a ratio below 1 is good. {escape(_rule(summary))}</p>\n"
        f"{_matrix(summary, other)}\n{picture}</section>"
    )


def _rule(summary: dict[str, Any]) -> str:
    """What it takes to be ahead."""
    return f"{RULE} {chance_words(fewest_runs(summary))}"


def _matrix(summary: dict[str, Any], other: str) -> str:
    words = {metric["name"]: metric["words"] for metric in summary["metrics"]}
    head = "".join(f"<th>{escape(words[name])}</th>" for name in MATRIX)
    rows = []
    for workload in summary["workloads"]:
        lines = {line["metric"]: line for line in workload["table"]}
        cells = "".join(_cell(lines[name]["ratios"][other]) for name in MATRIX)
        name = f'<a href="#{_anchor(workload)}">{escape(workload["name"])}</a>'
        rows.append(f"<tr><th>{name}</th>{cells}</tr>")
    return (
        f'<div class="scroll"><table class="matrix"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(ratio: dict[str, Any]) -> str:
    spread = f'<span class="spread">{escape(ratio["spread_text"])}</span>'
    return (
        f'<td><span class="cell {ratio["verdict"]}" title="{ratio["verdict"]}">'
        f"{escape(ratio['text'])}{spread if ratio['spread_text'] else ''}</span></td>"
    )


def _workload(summary: dict[str, Any], workload: dict[str, Any], is_drawn: bool) -> str:
    pictures = ""
    if is_drawn:
        from . import plots

        drawn: list[tuple[Draw, str]] = [
            (plots.throughput, "Throughput: a dot a run, a bar at the median"),
            (
                plots.memory_by_state,
                "What held memory was for, mean over time; dashed: the cap",
            ),
            (plots.latency, "Latencies: a point at the median, a line that spans the runs"),
            (plots.memory_over_time, "KV memory held (line) and live (dotted); dashed: the cap"),
        ]
        figures = [_figure(draw(workload), words) for draw, words in drawn]
        pictures = f'<div class="figures">{"".join(figures)}</div>'
    headlines = {metric["name"] for metric in summary["metrics"] if metric["is_headline"]}
    others = [line for line in workload["table"] if line["metric"] not in headlines]
    shown = [line for line in workload["table"] if line["metric"] in headlines]
    return (
        f'<section id="{_anchor(workload)}"><h2>{escape(workload["name"])}</h2>\n'
        f'<p class="muted">{escape(_sentence(workload))}</p>\n'
        f"{_warning(workload['unserved'])}{_table(summary, shown)}\n{pictures}\n"
        f"<details><summary>{len(others)} more figures</summary>{_table(summary, others)}</details>"
        "</section>"
    )


def _warning(words: str) -> str:
    return f'<div class="banner bad">{escape(words)}</div>\n' if words else ""


def _sentence(workload: dict[str, Any]) -> str:
    prompt, output = workload["prompt_tokens"], workload["output_tokens"]
    arrival = (
        f"arriving over {workload['last_arrival_s']:.1f} s"
        if workload["is_realtime"]
        else "all there at the start"
    )
    cap = workload["cap_bytes"] / 2**20
    return (
        f"{workload['summary'].capitalize()}. {workload['num_requests']} requests, "
        f"{workload['num_completions']} completions, {arrival}. Prompts of {prompt['min']} to "
        f"{prompt['max']} tokens (mean {prompt['mean']:.0f}), outputs of {output['min']} to "
        f"{output['max']} (mean {output['mean']:.0f}). Cap of {cap:.2f} MiB: "
        f"{workload['cap_words']}."
    )


def _table(summary: dict[str, Any], lines: list[dict[str, Any]]) -> str:
    first, *others = summary["backends"]
    metrics = {metric["name"]: metric for metric in summary["metrics"]}
    arms = "".join(f"<th>{escape(arm)}</th>" for arm in (first, *others))
    ratios = "".join(
        f'<th class="ratio-head">{escape(first)} / {escape(other)}</th>' for other in others
    )
    rows, group = [], ""
    for line in lines:
        metric = metrics[line["metric"]]
        if metric["group"] != group:
            group = metric["group"]
            span = 1 + len(summary["backends"]) + len(others)
            rows.append(f'<tr class="group"><th colspan="{span}">{escape(group)}</th></tr>')
        unit = f", {metric['unit']}" if metric["unit"] in ("ms", "us") else ""
        values = "".join(f"<td>{_text(line['values'][arm])}</td>" for arm in (first, *others))
        compared = "".join(_ratio(line["ratios"][other], first, other) for other in others)
        rows.append(
            f'<tr><th title="{escape(metric["explanation"])}">{escape(metric["words"] + unit)}'
            f"</th>{values}{compared}</tr>"
        )
    return (
        f'<div class="scroll"><table><thead><tr><th></th>{arms}{ratios}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _text(value: dict[str, Any]) -> str:
    spread = f'<span class="spread">{escape(value["spread_text"])}</span>'
    return f"{escape(value['text'])}{spread if value['spread_text'] else ''}"


def _ratio(ratio: dict[str, Any], first: str, other: str) -> str:
    words = {"better": f"{first} ahead", "worse": f"{other} ahead", "tie": "tie"}
    chip = words.get(ratio["verdict"], "")
    mark = f'<span class="chip {ratio["verdict"]}">{escape(chip)}</span>' if chip else ""
    return (
        f'<td><div class="ratio"><div>{_text(ratio)}</div><div class="mark">{mark}</div></div></td>'
    )


def _definitions(summary: dict[str, Any]) -> str:
    entries = "".join(
        f"<dt>{escape(metric['words'])}</dt><dd>{escape(metric['explanation'])}</dd>"
        for metric in summary["metrics"]
    )
    return f'<section id="definitions"><h2>Definitions</h2><dl>{entries}</dl></section>'


def _origin(summary: dict[str, Any]) -> str:
    """Where the figures come from, and all settings."""
    provenance, settings = summary["provenance"], summary["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
    kernels = {
        f"{arm}: {kernel} over {workload['drivers'][arm]}"
        for workload in summary["workloads"]
        for arm, kernel in workload["kernels"].items()
    }
    changed = " with local changes" if provenance["has_local_changes"] else ""
    rows = {
        "Date": provenance["date"],
        "Commit": provenance["commit"] + changed,
        "Seed": str(provenance["seed"]),
        "Machine": f"{provenance['cpu']}, {provenance['cores']} cores, Linux "
        f"{provenance['kernel']}, load {provenance['load_average']}",
        "Versions": f"Python {provenance['python']}, {versions}",
        "Threads": f"{summary['facts']['torch_threads']} of torch",
        "Kernels": "; ".join(sorted(kernels)),
        **{name: str(value) for name, value in settings["config"].items() if value is not None},
    }
    entries = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in rows.items()
    )
    return f'<section id="origin"><h2>Origin</h2><dl>{entries}</dl></section>'


def _figure(svg: str, words: str, *, is_wide: bool = False) -> str:
    kind = ' class="wide"' if is_wide else ""
    return f"<figure{kind}>{svg}<figcaption>{escape(words)}</figcaption></figure>"


def _anchor(workload: dict[str, Any]) -> str:
    kept = "".join(char if char.isalnum() else "-" for char in workload["name"])
    return f"workload-{kept}"
