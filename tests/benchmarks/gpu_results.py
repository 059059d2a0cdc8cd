"""A results file of the GPU benchmark with made-up numbers, for tables and figures.

Owns: nothing.  Thread-safety: makes new values.
"""

from typing import Any


def spread(median: float) -> dict[str, float]:
    return {
        "median": median,
        "p10": median - 0.5,
        "p90": median + 0.5,
        "min": median - 1,
        "max": median + 1,
        "n": 9,
    }


def tail(middle: float) -> dict[str, float]:
    return {
        "p50": middle,
        "p90": 2 * middle,
        "p99": 3 * middle,
        "max": 4 * middle,
        "mean": middle,
        "n": 9,
    }


def made_up_results() -> dict[str, Any]:
    """Every section once; nothing in it was measured."""
    results = {
        "prepare": {"wheels": {}, "build": {"seconds": 20.0, "library": "_core.so"}},
        "facts": {
            "device": {
                "device_name": "made up",
                "granularity_bytes": 2 << 20,
                "unmap_runs": True,
                "access_runs": True,
                "read_only": True,
            },
            "ceilings": {
                name: spread(10.0)
                for name in (
                    "copy_gb_per_s",
                    "bf16_tflop_per_s",
                    "host_to_device_gb_per_s",
                    "device_to_host_gb_per_s",
                )
            },
        },
        "tests": {
            "suites": {
                "tests/gpu": {
                    "passed": 3,
                    "failed": 1,
                    "skipped": 0,
                    "seconds": 9.0,
                    "returncode": 1,
                }
            },
            "failures": [{"suite": "gpu", "test": "test_x", "message": "assert 1 == 2"}],
        },
        "kernel_probes": {
            "rows": [
                {
                    "kernel": kernel,
                    "length": 17,
                    "expected": expected,
                    "found": expected,
                    "rel_error": error,
                    "is_as_expected": True,
                }
                for kernel, expected, error in (
                    ("ours", "exact", 2e-3),
                    ("ours fa3-tma", "error 700", None),
                )
            ]
        },
        "driver_calls": {
            "runs": [
                {
                    "stream": stream,
                    "page_bytes": 2 << 20,
                    "num_pages": pages,
                    **{
                        f"{name}_us": spread(12.5)
                        for name in ("create", "map_new", "map", "unmap", "destroy")
                    },
                }
                for stream in ("idle", "busy")
                for pages in (1, 8, 64)
            ]
        },
        "attention": {
            "copy_gb_per_s": spread(4000.0),
            "rows": [
                {
                    "phase": phase,
                    "batch": 8,
                    "length": 1024,
                    "kernels": {
                        "raw fa2, slots": {"us": spread(50.0), "roofline": 0.8},
                        "raw fa2, blocks of 256": {"us": spread(52.0), "roofline": 0.77},
                        "ours triton, slots": {"us": spread(60.0), "roofline": 0.7},
                    },
                }
                for phase in ("decode", "prefill")
            ],
        },
        "serving": {
            "runs": [
                {
                    "kv_backend": kind,
                    "cuda_graphs": has_graphs,
                    "output_tokens_per_s": 1000.0,
                    "tpot_ms": tail(8.0),
                    "itl_ms": tail(7.0),
                    "created_bytes": 3 << 30,
                    "peak_committed_bytes": 2 << 30,
                    "peak_live_bytes": 1 << 30,
                    "utilisation": 0.95,
                    "roofline": 0.7,
                }
                for kind in ("virtual", "paged")
                for has_graphs in (True, False)
            ],
            "agreement": {"virtual, graphs | paged, graphs": 0.9},
        },
        "layout": {
            "rows": [
                {
                    "layers_per_group": group,
                    "page_bytes": mib << 20,
                    "attention_us": spread(900.0),
                    "pages_per_step": 2.0,
                    "map_calls_per_step": 2.0,
                    "waste": 0.04,
                }
                for group in (1, 32)
                for mib in (2, 4)
            ]
        },
        "commit_jitter": {
            "rows": [
                {
                    "commit_ahead_tokens": ahead,
                    "pool": "new",
                    "step_ms": tail(6.0),
                    "allocator_us": tail(40.0),
                    "hidden_share": 0.5,
                }
                for ahead in (0, 4)
            ]
        },
        "peers": {
            "rows": [
                {
                    "allocator": "vmalloc",
                    "num_pages": 8,
                    "grow_us": spread(800.0),
                    "give_back_us": spread(400.0),
                    "grow_pooled_us": spread(80.0),
                    "to_pool_us": spread(40.0),
                },
                {
                    "allocator": "kvcached",
                    "num_pages": 8,
                    "grow_us": spread(900.0),
                    "give_back_us": spread(500.0),
                },
            ]
        },
    }
    entry = {"status": "ok", "wall_s": 1.0, "limit_s": 9.0, "driver": "stand-in", "skipped": {}}
    return {
        "schema": 1,
        "dry_run": False,
        "provenance": {},
        "budget_s": 525.0,
        "wall_s": 400.0,
        "sections": {name: {**entry, "result": result} for name, result in results.items()},
    }
