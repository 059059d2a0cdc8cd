"""Traces from CSV files: read as they say, and refused by line and value."""

import re

import pytest

from vmalloc.engine import ConfigError
from vmalloc.engine.ab.trace_file import read_trace

HEADER = "arrival_s,prompt_tokens,output_tokens\n"


@pytest.fixture
def read(tmp_path):
    def call(text, **settings):
        path = tmp_path / "trace.csv"
        path.write_text(text, encoding="utf-8")
        return read_trace(path, **{"vocab_size": 50, "context_tokens": 100, **settings})

    return call


def lengths(workload):
    return [
        (one.arrival_s, len(one.prompt_token_ids), one.num_output_tokens)
        for one in workload.requests
    ]


def test_requests_are_as_the_lines_say_in_order_of_arrival(read):
    workload = read(HEADER + "1.5,7,3\n\n0,10,90\n 1.5 , 1 , 1 \n")
    assert lengths(workload) == [(0.0, 10, 90), (1.5, 7, 3), (1.5, 1, 1)]
    assert workload.is_realtime
    assert workload.name == "trace.csv"
    assert all(0 < token_id < 50 for one in workload.requests for token_id in one.prompt_token_ids)


def test_columns_may_stand_in_any_order_behind_a_byte_order_mark(read):
    workload = read("\ufeffoutput_tokens,arrival_s,prompt_tokens\r\n3,2.5,7\r\n")
    assert lengths(workload) == [(2.5, 7, 3)]


def test_a_seed_makes_one_set_of_prompts(read):
    text = HEADER + "0,30,3\n"
    assert read(text, seed=1) == read(text, seed=1)
    assert read(text, seed=1) != read(text, seed=2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "it has no requests"),
        (HEADER, "it has no requests"),
        ("arrival,prompt_tokens,output_tokens\n0,1,1\n", "line 1: 'arrival,prompt_tokens,output"),
        ("0,1,1\n", "line 1: '0,1,1'; it must be arrival_s,prompt_tokens,output_tokens"),
        (HEADER + "0,1,1\n0,1\n", "line 3: '0,1' has 2 values, not 3"),
        (HEADER + "0,1,1,1\n", "line 2: '0,1,1,1' has 4 values, not 3"),
        (HEADER + "\nsoon,1,1\n", "line 3: arrival_s is 'soon'"),
        (HEADER + "-1,1,1\n", "line 2: arrival_s is '-1'"),
        (HEADER + "nan,1,1\n", "line 2: arrival_s is 'nan'"),
        (HEADER + "inf,1,1\n", "line 2: arrival_s is 'inf'"),
        (
            HEADER + "1763760000,1,1\n",
            "line 2: arrival_s is '1763760000'; it must be",
        ),
        (HEADER + "1e300,1,1\n", "line 2: arrival_s is '1e300'"),
        (HEADER + "0,0,1\n", "line 2: prompt_tokens is '0'"),
        (HEADER + "0,1.5,1\n", "line 2: prompt_tokens is '1.5'"),
        (HEADER + "0,1,\n", "line 2: output_tokens is ''"),
        (HEADER + "0,1,-2\n", "line 2: output_tokens is '-2'"),
        (HEADER + f"0,1,{'9' * 5000}\n", "line 2: output_tokens is '999"),
        (HEADER + "0,60,41\n", "line 2: prompt_tokens is 60 and output_tokens 41"),
    ],
)
def test_what_cannot_be_used_is_named(read, text, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        read(text)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    settings = {"vocab_size": 50, "context_tokens": 100}
    with pytest.raises(ConfigError, match=r"none\.csv'; it cannot be read"):
        read_trace(tmp_path / "none.csv", **settings)
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.csv'; it cannot be read"):
        read_trace(tmp_path / "binary.csv", **settings)
