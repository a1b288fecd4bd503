"""Dagster: a protected corpus as an asset, made every hour; the run's record is its metadata.

dagster dev -f examples/orchestrators/dagster_definitions.py
"""

import json
import os
import subprocess

import dagster

SOURCE = os.environ.get("SOURCE", "s3://in/photos")
DESTINATION = os.environ.get("DESTINATION", "s3://out/photos")


@dagster.asset(retry_policy=dagster.RetryPolicy(max_retries=2, delay=300))
def protected_photos(context: dagster.AssetExecutionContext) -> dagster.MaterializeResult:
    """Every photo of the source, protected."""
    job = f"protect-{context.run.run_id}-{context.retry_number}"  # a retry is a new job
    command = ["one4all", "submit", "--submission-id", job, "protect", SOURCE, DESTINATION]
    code = subprocess.run(command, check=False).returncode
    if code == 2:
        raise dagster.Failure("the request is wrong: see the log", allow_retries=False)
    if code not in (0, 3, 75):
        raise RuntimeError(f"exit code {code}: what is done is done, the rest is tried again")
    asked = ["one4all", "status", DESTINATION, "--runs", "--json"]
    runs = json.loads(subprocess.run(asked, check=True, capture_output=True).stdout)
    # 75: another run is at work. Its record comes when it ends; the last one there is, says less.
    return dagster.MaterializeResult(
        metadata={name: str(value) for name, value in runs[0].items()} | {"exit_code": code}
    )


job = dagster.define_asset_job("protect", selection=[protected_photos])
definitions = dagster.Definitions(
    assets=[protected_photos],
    jobs=[job],
    schedules=[dagster.ScheduleDefinition(job=job, cron_schedule="17 * * * *")],
)
