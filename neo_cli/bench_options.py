"""Options of `neo bench`; defaults come from the configurations that they end up in."""

from pathlib import Path
from typing import Annotated

from neo_cli.options import option

SYSTEM_PANEL = "What is measured"
WORKLOAD_PANEL = "Workload"
LOAD_PANEL = "Load"
RESULT_PANEL = "Results"

Systems = Annotated[
    str,
    option(
        "Systems to start in turn: neo, gpu-only, asymmetric, overlap, vllm, vllm-256, vllm-512.",
        SYSTEM_PANEL,
    ),
]
BaseUrl = Annotated[
    str | None, option("Measure this OpenAI-compatible server instead.", SYSTEM_PANEL)
]
InProcess = Annotated[
    bool, option("Call the engine directly, without a server.", SYSTEM_PANEL, "--in-process")
]
Simulate = Annotated[
    str | None,
    option(
        "Simulate these machines: names, JSON files, or `all` for what each would gain.",
        SYSTEM_PANEL,
    ),
]
Backend = Annotated[str, option("Of servers: openai (completions) or openai-chat.", SYSTEM_PANEL)]
Endpoint = Annotated[str | None, option("Path, if it is not the backend's own.", SYSTEM_PANEL)]
Header = Annotated[
    list[str] | None, option("KEY=VALUE sent to the server; repeatable.", SYSTEM_PANEL)
]
Tokenizer = Annotated[
    str | None,
    option("Makes and counts prompts; the model's own if left out.", SYSTEM_PANEL),
]
PromptFormat = Annotated[
    str,
    option("text or tokens; auto is tokens for systems that are started.", SYSTEM_PANEL),
]
IgnoreEos = Annotated[
    bool, option("Have as many tokens generated as the workload says.", SYSTEM_PANEL)
]
Temperature = Annotated[float, option("Of sampling; 0 is greedy.", SYSTEM_PANEL)]
ExtraBody = Annotated[
    str | None,
    option("JSON object added to every request; null takes a key away.", SYSTEM_PANEL),
]
ReadyCheckTimeoutSec = Annotated[
    float, option("Longest wait for a server to answer.", SYSTEM_PANEL)
]
DatasetName = Annotated[
    str,
    option(
        "synthetic (or random), summarize, azure-code, azure-conv, sharegpt, custom, lengths.",
        WORKLOAD_PANEL,
    ),
]
DatasetPath = Annotated[
    str | None, option("Its file; for summarize also a folder or hub id.", WORKLOAD_PANEL)
]
NumPrompts = Annotated[int, option("Requests of each point.", WORKLOAD_PANEL)]
Seed = Annotated[int, option("Of workload and arrivals.", WORKLOAD_PANEL)]
InputLen = Annotated[
    int,
    option(
        "Mean prompt tokens of synthetic.",
        WORKLOAD_PANEL,
        "--input-len",
        "--random-input-len",
    ),
]
OutputLen = Annotated[
    str | None,
    option(
        "Output tokens, one or a list such as 50,100; the data set's own if left out.",
        WORKLOAD_PANEL,
        "--output-len",
        "--random-output-len",
    ),
]
RangeRatio = Annotated[
    float,
    option(
        "Lengths of synthetic vary by this share, uniformly.",
        WORKLOAD_PANEL,
        "--range-ratio",
        "--random-range-ratio",
    ),
]
NoOversample = Annotated[
    bool,
    option("Do not repeat a data set that is too short.", WORKLOAD_PANEL, "--no-oversample"),
]
DisableShuffle = Annotated[
    bool, option("Take texts in their file's order.", WORKLOAD_PANEL, "--disable-shuffle")
]
SkipChatTemplate = Annotated[
    bool, option("Send custom prompts as they are.", WORKLOAD_PANEL, "--skip-chat-template")
]
RequestRate = Annotated[
    str, option("Requests a second, one or a list such as 1,2,4,inf.", LOAD_PANEL)
]
Burstiness = Annotated[
    float, option("1 is Poisson, less comes in bursts, inf is constant.", LOAD_PANEL)
]
RampUpStrategy = Annotated[str | None, option("linear or exponential.", LOAD_PANEL)]
RampUpStartRps = Annotated[float | None, option("Rate at the first request.", LOAD_PANEL)]
RampUpEndRps = Annotated[float | None, option("Rate at the last request.", LOAD_PANEL)]
UseTraceArrivals = Annotated[
    bool, option("Send requests when the trace says.", LOAD_PANEL, "--use-trace-arrivals")
]
MaxConcurrency = Annotated[int | None, option("Most requests under way at once.", LOAD_PANEL)]
NumWarmups = Annotated[
    int, option("Requests before the first point that do not count.", LOAD_PANEL)
]
Repeats = Annotated[int, option("Measurements of each point; systems take turns.", LOAD_PANEL)]
MetricPercentiles = Annotated[str, option("Percentiles of each metric, a list.", RESULT_PANEL)]
Goodput = Annotated[
    list[str] | None,
    option("METRIC:MS with ttft, tpot or e2el; all must hold; repeatable.", RESULT_PANEL),
]
SaveDetailed = Annotated[
    bool, option("Keep every request's times and text.", RESULT_PANEL, "--save-detailed")
]
ResultDir = Annotated[Path, option("A JSON file a point; finished points are kept.", RESULT_PANEL)]
Overwrite = Annotated[bool, option("Measure finished points again.", RESULT_PANEL, "--overwrite")]
Label = Annotated[str | None, option("Name of the results.", RESULT_PANEL)]
Metadata = Annotated[
    list[str] | None, option("KEY=VALUE kept in the results; repeatable.", RESULT_PANEL)
]
Baseline = Annotated[str, option("The system that others are compared with.", RESULT_PANEL)]
LogSteps = Annotated[
    bool, option("Write step logs beside the results.", RESULT_PANEL, "--log-steps")
]
AsJson = Annotated[bool, option("Print the results as JSON.", RESULT_PANEL, "--json")]
