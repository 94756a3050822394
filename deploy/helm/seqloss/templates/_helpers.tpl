{{- define "seqloss.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 63 | trimSuffix "-" -}}
{{- end }}

{{- /* Eight characters are left for "-metrics". */}}
{{- define "seqloss.fullname" -}}
{{- $name := .Values.nameOverride | default .Chart.Name -}}
{{- $default := contains $name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name $name) -}}
{{- .Values.fullnameOverride | default $default | trunc 55 | trimSuffix "-" -}}
{{- end }}

{{- define "seqloss.metricsName" -}}
{{- include "seqloss.fullname" . }}-metrics
{{- end }}

{{- define "seqloss.serviceAccountName" -}}
{{- .Values.serviceAccount.name | default (.Values.serviceAccount.create | ternary (include "seqloss.fullname" .) "default") -}}
{{- end }}

{{- define "seqloss.selectorLabels" -}}
app.kubernetes.io/name: {{ include "seqloss.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- /* Of pods: a new version of the chart alone starts none anew. */}}
{{- define "seqloss.podLabels" -}}
{{- with .Values.commonLabels }}
{{- toYaml . }}
{{ end -}}
{{ include "seqloss.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end }}

{{- define "seqloss.labels" -}}
{{ include "seqloss.podLabels" . }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "seqloss.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}
{{- end }}

{{- /* Numbers by way of JSON: Helm knows floats alone, and would print 2000000 as 2e+06. */}}
{{- define "seqloss.settingText" -}}
{{- if kindIs "string" . }}{{ . }}{{ else if kindIs "slice" . }}{{ join "," . }}{{ else }}{{ toJson . }}{{ end -}}
{{- end }}

{{- /* What the service takes to end, rounded up: see terminationMarginSeconds in values.yaml. */}}
{{- define "seqloss.gracePeriodSeconds" -}}
{{- $delay := dig "drain_delay_seconds" 0 .Values.settings | float64 | ceil | int64 -}}
{{- $timeout := dig "drain_timeout_seconds" 30 .Values.settings | int64 -}}
{{- add $delay $timeout .Values.preStopSleepSeconds .Values.terminationMarginSeconds -}}
{{- end }}

{{- /* Tokens per replica that may wait. A replica refuses requests beyond max_queue_tokens. */}}
{{- define "seqloss.tokensPerReplica" -}}
{{- $threshold := mulf .Values.autoscaling.tokensPerSecond .Values.autoscaling.acceptableWaitSeconds -}}
{{- $most := dig "max_queue_tokens" 2000000 .Values.settings | float64 -}}
{{- if ge $threshold $most -}}
{{- fail (printf "autoscaling: tokensPerSecond x acceptableWaitSeconds is %.0f, and a replica refuses requests at max_queue_tokens, %.0f: it would never be reached; accept less, or raise settings.max_queue_tokens" $threshold $most) -}}
{{- end -}}
{{- $threshold | ceil | int64 -}}
{{- end }}

{{- /* Whether the pod has a volume with bundles. */}}
{{- define "seqloss.hasBundleVolume" -}}
{{- if or .Values.bundleVolume.source .Values.bundleFetch.enabled }}true{{ end -}}
{{- end }}

{{- /* What values.schema.json cannot say. */}}
{{- define "seqloss.check" -}}
{{- if not .Values.bundles -}}
{{- fail "bundles: name at least one model and its folder in the container, such as --set bundles.demo=/bundles/demo, and say with bundleVolume.source or bundleFetch where the folder comes from" -}}
{{- end -}}
{{- if and .Values.bundleVolume.source .Values.bundleFetch.enabled -}}
{{- fail "bundleVolume.source and bundleFetch.enabled: bundles come from a volume, or are fetched into an emptyDir; leave one out" -}}
{{- end -}}
{{- if and .Values.bundleFetch.enabled (not .Values.bundleFetch.image) -}}
{{- fail "bundleFetch.image: the init container needs an image, with its tag or digest" -}}
{{- end -}}
{{- if and .Values.autoscaling.enabled (not .Values.autoscaling.serverAddress) -}}
{{- fail "autoscaling.serverAddress: KEDA needs to know which Prometheus to ask" -}}
{{- end -}}
{{- if and .Values.autoscaling.enabled (gt (.Values.autoscaling.minReplicas | int64) (.Values.autoscaling.maxReplicas | int64)) -}}
{{- fail "autoscaling: minReplicas is above maxReplicas" -}}
{{- end -}}
{{- if and .Values.ingress.enabled (not .Values.ingress.hosts) -}}
{{- fail "ingress.hosts: an Ingress without a host would take every request of its controller" -}}
{{- end -}}
{{- if eq (.Values.ports.http | int64) (.Values.ports.admin | int64) -}}
{{- fail "ports: http and admin are the same" -}}
{{- end -}}
{{- end }}
