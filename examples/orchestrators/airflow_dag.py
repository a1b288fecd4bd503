"""Airflow: protect what is new every hour, then carry on with what the run says of itself.

Put this file into the folder of DAGs. The environment of Airflow's workers needs `one4all` and the
address of a Ray cluster (RAY_API_SERVER_ADDRESS), and SOURCE and DESTINATION, unless you set them
below.
"""

import json
import os
import subprocess
from datetime import UTC, datetime, timedelta

from airflow.sdk import dag, get_current_context, task
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException

SOURCE = os.environ.get("SOURCE", "s3://in/photos")
DESTINATION = os.environ.get("DESTINATION", "s3://out/photos")


@dag(
    schedule="17 * * * *",
    start_date=datetime(2026, 1, 1, tzinfo=UTC),
    catchup=False,
    max_active_runs=1,
)
def one4all_protect():
    @task(retries=2, retry_delay=timedelta(minutes=5))
    def protect() -> None:
        context = get_current_context()
        # A worker of Airflow that is lost and comes back follows its job. A retry is a new one: the
        # id of a job that has failed would only be told again that it has.
        job = f"protect-{context['run_id']}-{context['ti'].try_number}".replace(":", "-").replace(
            "+", "-"
        )
        command = ["one4all", "submit", "--submission-id", job, "protect", SOURCE, DESTINATION]
        code = subprocess.run(command, check=False).returncode
        if code == 75:
            raise AirflowSkipException("another run is at work")
        if code == 2:
            raise AirflowFailException("the request is wrong: see the log")  # no retry helps
        if code not in (0, 3):  # 3: all that can be done is done, and bad images are named
            raise AirflowException(
                f"exit code {code}: what is done is done, the rest is tried again"
            )

    @task
    def record() -> dict[str, object]:
        command = ["one4all", "status", DESTINATION, "--runs", "--json"]
        return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)[0]

    @task
    def publish(run: dict[str, object]) -> None:
        print(f"run {run['run_id']}: {run['num_images']} images are new; publish them here")

    protected = protect()
    last = record()
    protected >> last
    publish(last)


protect_dag = one4all_protect()
if __name__ == "__main__":
    protect_dag.test()
