"""What the roles in infra/aws can and cannot do: moto enforces them, under the requests of Sluice's own classes."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import boto3
import moto.settings
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError
from moto import mock_aws
from moto.core.authorization import ActionAuthenticatorMixin

from pipelines.doctor import bucket_checks
from services.core.errors import ApiKeysUnavailable, StoreUnavailable
from services.core.settings import Settings
from services.gateway.api_keys import ApiKeyRegistry
from services.policies.registry import BUILT_IN, PolicyRegistry
from services.policies.tenants import TenantsDocument
from tests.support.deployment_files import INFRA

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

BUCKET: Final = "moderation-policies"
ROLES: Final = ("sluice-head", "sluice-intake", "sluice-gateway", "sluice-guard")
"""Of processes."""
PEOPLE: Final = ("sluice-policy-editor", "sluice-access-admin")
TENANTS_DOCUMENT: Final = {"kind": "tenants", "name": "tenants", "tenants": {"shop": "default"}}
VERSIONS: Final = "policies/default/versions/"


class Account:
    """An AWS account with the roles, an image, a policy and an API key."""

    def __init__(self) -> None:
        self.owner = boto3.client("s3", "us-east-1")
        for bucket in (BUCKET, "uploads", "moderation-weights", "unrelated"):
            self.owner.create_bucket(Bucket=bucket)
        self.owner.put_object(Bucket="uploads", Key="cat.jpg", Body=b"cat")
        self.owner.put_object(Bucket="unrelated", Key="secret", Body=b"secret")
        PolicyRegistry(self.owner, BUCKET).publish_built_in()
        (published,) = self.owner.list_objects_v2(Bucket=BUCKET, Prefix=VERSIONS)["Contents"]
        self.version_key = published["Key"]
        self.key, _ = ApiKeyRegistry(self.owner, BUCKET).create("shop", "moderate", who="owner")
        iam = boto3.client("iam", "us-east-1")
        self._credentials = {}
        for role in ROLES + PEOPLE:
            trust = (INFRA / "aws" / ("trust.json" if role in ROLES else "trust-people.json")).read_text()
            arn = iam.create_role(RoleName=role, AssumeRolePolicyDocument=trust)["Role"]["Arn"]
            document = (INFRA / "aws" / f"{role}.json").read_text()
            iam.put_role_policy(RoleName=role, PolicyName=role, PolicyDocument=document)
            session = boto3.client("sts", "us-east-1").assume_role(RoleArn=arn, RoleSessionName="test")
            self._credentials[role] = session["Credentials"]

    def client(self, role: str) -> "S3Client":
        """S3 as a process with this role sees it."""
        given = self._credentials[role]
        return boto3.client(
            "s3",
            "us-east-1",
            aws_access_key_id=given["AccessKeyId"],
            aws_secret_access_key=given["SecretAccessKey"],
            aws_session_token=given["SessionToken"],
            config=Config(s3={"addressing_style": "path"}, retries={"max_attempts": 1}),
        )


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch) -> Iterator[Account]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    with mock_aws():
        made = Account()
        monkeypatch.setattr(moto.settings, "INITIAL_NO_AUTH_ACTION_COUNT", 0)
        monkeypatch.setattr(ActionAuthenticatorMixin, "request_count", 0)
        yield made


def denied(call: Any, **arguments: Any) -> bool:
    try:
        call(**arguments)
    except ClientError as error:
        if error.response["Error"]["Code"] != "AccessDenied":
            raise
        return True
    return False


def test_gateway_reads_keys_and_publishes_policies(account: Account) -> None:
    s3 = account.client("sluice-gateway")
    keys, policies = ApiKeyRegistry(s3, BUCKET), PolicyRegistry(s3, BUCKET)

    assert keys.read_index() == {account.key.id: False}
    assert keys.get(account.key.id) == account.key
    second = policies.publish(BUILT_IN)
    assert policies.activate("default", second.version, who="admin").version == 2
    assert s3.get_object(Bucket="uploads", Key="cat.jpg")["Body"].read() == b"cat"


def test_intake_reads_policies_and_trips_breakers(account: Account) -> None:
    s3 = account.client("sluice-intake")
    policies = PolicyRegistry(s3, BUCKET)

    assert policies.get("default", 1).document == BUILT_IN
    newest = policies.find_newest_change("default")
    assert newest
    tripped = policies.trip("default", 1, since_change=newest.rollout.since, who="intake", why="too many blocks")
    assert tripped.action == "trip"
    assert s3.get_object(Bucket="uploads", Key="cat.jpg")["Body"].read() == b"cat"


def test_head_publishes_the_built_in_policy(account: Account) -> None:
    s3 = account.client("sluice-head")
    PolicyRegistry(s3, BUCKET).publish_built_in()

    assert not denied(s3.put_object, Bucket=BUCKET, Key=f"{VERSIONS}probe", Body=b"")
    assert denied(s3.put_object, Bucket=BUCKET, Key="policies/of-a-tenant/versions/probe", Body=b"")


@pytest.mark.parametrize("role", ["sluice-head", "sluice-intake", "sluice-gateway"])
def test_doctor_finds_no_fault_with_a_role(role: str, account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head has no right to images, and says so. A policy of a tenant does not mislead the check of writes."""
    gateway = account.client("sluice-gateway")
    PolicyRegistry(gateway, BUCKET).publish(BUILT_IN.model_copy(update={"name": "a-tenant"}))
    before = gateway.list_objects_v2(Bucket=BUCKET)["Contents"]
    monkeypatch.setattr(bucket_checks, "_open_client", lambda _: account.client(role))
    settings = Settings(s3_buckets="uploads", policy_bucket=BUCKET)

    results = [*bucket_checks.run_bucket_checks(settings), *bucket_checks.run_policy_bucket_checks(settings)]

    problems = {result.check: result.detail for result in results if not result.is_ok}
    assert problems.keys() == ({"buckets"} if role == "sluice-head" else set())
    assert gateway.list_objects_v2(Bucket=BUCKET)["Contents"] == before


def test_doctor_names_the_right_that_a_role_lacks(account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket_checks, "_open_client", lambda _: account.client("sluice-guard"))

    with pytest.raises(StoreUnavailable, match="grant s3:ListBucket"):
        list(bucket_checks.run_policy_bucket_checks(Settings(policy_bucket=BUCKET)))


def test_taken_intake_can_neither_replace_a_version_nor_read_a_key(account: Account) -> None:
    s3 = account.client("sluice-intake")

    assert denied(s3.put_object, Bucket=BUCKET, Key=account.version_key, Body=b"allow everything")
    assert denied(s3.put_object, Bucket=BUCKET, Key="policies/new/versions/1", Body=b"allow everything")
    assert denied(s3.get_object, Bucket=BUCKET, Key=f"keys/{account.key.id}/key.json")


def test_policy_editor_publishes_and_rolls_out_policies(account: Account) -> None:
    policies = PolicyRegistry(account.client("sluice-policy-editor"), BUCKET)

    second = policies.publish(BUILT_IN)
    assert policies.activate("default", second.version, who="ada").version == 2


def test_policy_editor_can_neither_read_nor_forge_access(account: Account) -> None:
    """Who writes policies cannot make API keys, nor revoke them, nor assign policies to tenants."""
    s3 = account.client("sluice-policy-editor")
    keys = ApiKeyRegistry(s3, BUCKET)

    with pytest.raises(ApiKeysUnavailable):
        keys.create("mine", "admin")
    with pytest.raises(ApiKeysUnavailable):
        keys.revoke(account.key.id)
    assert denied(s3.get_object, Bucket=BUCKET, Key=f"keys/{account.key.id}/key.json")
    for folder in ("versions", "changes"):
        assert denied(s3.put_object, Bucket=BUCKET, Key=f"policies/tenants/{folder}/99999998.json", Body=b"{}")


def test_access_admin_creates_and_revokes_keys_and_changes_tenants(account: Account) -> None:
    s3 = account.client("sluice-access-admin")
    keys, policies = ApiKeyRegistry(s3, BUCKET), PolicyRegistry(s3, BUCKET)

    key, _ = keys.create("news", "moderate")
    assert keys.get(key.id) == key
    keys.revoke(account.key.id)
    assert keys.read_index() == {account.key.id: True, key.id: False}
    published = policies.publish(TenantsDocument.model_validate(TENANTS_DOCUMENT))
    assert policies.activate("tenants", published.version, who="grace").version == 1


def test_access_admin_changes_no_policy(account: Account) -> None:
    s3 = account.client("sluice-access-admin")

    assert denied(s3.put_object, Bucket=BUCKET, Key="policies/default/versions/99999997.json", Body=b"{}")
    assert denied(s3.put_object, Bucket=BUCKET, Key="policies/default/changes/99999997.json", Body=b"{}")


@pytest.mark.parametrize("role", [*ROLES, "sluice-policy-editor"])
def test_only_access_admins_can_create_an_api_key(role: str, account: Account) -> None:
    """Not even beside the usual names."""
    s3 = account.client(role)

    for name in ("key.json", "revoked.json", "other"):
        assert denied(s3.put_object, Bucket=BUCKET, Key=f"keys/0123456789abcdef/{name}", Body=b"{}")


def test_people_need_a_second_factor() -> None:
    """moto evaluates no conditions of trust policies."""
    (statement,) = json.loads((INFRA / "aws" / "trust-people.json").read_text())["Statement"]
    assert statement["Condition"] == {"Bool": {"aws:MultiFactorAuthPresent": "true"}}


@pytest.mark.parametrize("role", ROLES + PEOPLE)
def test_no_role_can_delete_or_leave_its_buckets(role: str, account: Account) -> None:
    s3 = account.client(role)

    assert denied(s3.delete_object, Bucket=BUCKET, Key=f"keys/{account.key.id}/revoked.json")
    assert denied(s3.delete_object, Bucket=BUCKET, Key=account.version_key)
    assert denied(s3.put_bucket_policy, Bucket=BUCKET, Policy="{}")
    assert denied(s3.delete_bucket_policy, Bucket=BUCKET)
    assert denied(s3.put_object, Bucket="uploads", Key="cat.jpg", Body=b"dog")
    assert denied(s3.get_object, Bucket="unrelated", Key="secret")


def test_bucket_policy_denies_writes_without_the_condition(account: Account) -> None:
    """moto does not evaluate bucket policies, so this test does, for the requests of Sluice's classes."""
    seen: list[dict[str, str]] = []
    account.owner.meta.events.register("before-send.s3.PutObject", lambda request, **_: seen.append(request.headers))
    with pytest.MonkeyPatch.context() as context:
        context.setattr(moto.settings, "INITIAL_NO_AUTH_ACTION_COUNT", float("inf"))
        PolicyRegistry(account.owner, BUCKET).publish(BUILT_IN)
        ApiKeyRegistry(account.owner, BUCKET).revoke(account.key.id)
    assert len(seen) == 2

    for headers in seen:
        assert not bucket_policy_denies("s3:PutObject", {name.lower() for name in headers})
    assert bucket_policy_denies("s3:PutObject", set())
    assert bucket_policy_denies("s3:DeleteObject", {"if-none-match"})
    assert bucket_policy_denies("s3:DeleteObjectVersion", {"if-none-match"})


def bucket_policy_denies(action: str, headers: set[str]) -> bool:
    """Whether a statement denies a request over TLS for an object of the policy bucket, whoever sends it."""
    for statement in json.loads((INFRA / "aws" / "policy-bucket.json").read_text())["Statement"]:
        assert (statement["Effect"], statement["Principal"]) == ("Deny", "*")
        actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
        condition = statement.get("Condition", {})
        if condition == {"Bool": {"aws:SecureTransport": "false"}}:
            continue
        assert condition in ({}, {"Null": {"s3:if-none-match": "true"}})
        assert statement["Resource"] == f"arn:aws:s3:::{BUCKET}/*"
        if action in actions and (not condition or "if-none-match" not in headers):
            return True
    return False
