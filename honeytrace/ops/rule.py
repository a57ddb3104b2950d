"""The rule, under the name the ops know. It lives outside of this package, which imports torch."""

from honeytrace.rule import METRICS as METRICS
from honeytrace.rule import SPACES as SPACES
from honeytrace.rule import WatermarkRule as WatermarkRule
from honeytrace.rule import check_integer as check_integer
from honeytrace.rule import check_metric as check_metric
from honeytrace.rule import check_number as check_number
from honeytrace.rule import check_rule as check_rule
