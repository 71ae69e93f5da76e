{{- define "shiwu.redisHost" -}}
{{- .Values.valkey.enabled | ternary (printf "%s-valkey" (include "shiwu.fullname" .)) .Values.redis.host -}}
{{- end -}}

{{- define "shiwu.redisSecret" -}}
{{- .Values.valkey.enabled | ternary (default (printf "%s-valkey" (include "shiwu.fullname" .)) .Values.valkey.existingSecret) .Values.redis.existingSecret -}}
{{- end -}}

{{/* Users of files/redis-acl.conf, without `shiwu-`. */}}
{{- define "shiwu.redisRoles" -}}
{{- list "admin" "producer" "client" "consumer" "backfill" "hooks" "watcher" "sweep" "worker" "scaler" | toJson -}}
{{- end -}}

{{- define "shiwu.redisUrl" -}}
{{- $redis := .root.Values.redis -}}
{{- $login := "" -}}
{{- if include "shiwu.redisSecret" .root -}}
{{- $login = printf "%s:$(REDIS_PASSWORD)@" (urlquery .username) -}}
{{- end -}}
{{- if $redis.sentinel.enabled -}}
sentinel://{{ $login }}{{ join "," $redis.sentinel.addresses }}/{{ $redis.sentinel.master }}/{{ $redis.database }}
{{- if $redis.sentinel.passwordKey }}?sentinel_password=$(REDIS_SENTINEL_PASSWORD){{ end }}
{{- else if $redis.cluster.enabled -}}
{{ $redis.tls.enabled | ternary "clusters" "cluster" }}://{{ $login }}{{ join "," $redis.cluster.addresses }}/?shards={{ $redis.cluster.shards }}
{{- if and $redis.tls.enabled $redis.tls.caSecret }}&ssl_ca_certs=/etc/shiwu/redis-ca/{{ $redis.tls.caKey }}{{ end }}
{{- else -}}
{{ $redis.tls.enabled | ternary "rediss" "redis" }}://{{ $login }}{{ include "shiwu.redisHost" .root }}:{{ $redis.port }}/{{ $redis.database }}
{{- if and $redis.tls.enabled $redis.tls.caSecret }}?ssl_ca_certs=/etc/shiwu/redis-ca/{{ $redis.tls.caKey }}{{ end }}
{{- end -}}
{{- end -}}

{{/*
Variables that lead to Redis: (dict "root" $ "role" "sweep" "username" … "passwordKey" … "urlKey" …). The role is the
user of the trial server; at your own Redis empty values are the workers'.
*/}}
{{- define "shiwu.redisEnv" -}}
{{- $redis := .root.Values.redis -}}
{{- $trial := .root.Values.valkey.enabled -}}
{{- $secret := include "shiwu.redisSecret" .root -}}
{{- $urlKey := default (and $redis.urlKey (default $redis.urlKey .passwordKey)) .urlKey -}}
{{- if and $urlKey (not $trial) }}
- name: SHIWU_REDIS_URL
  valueFrom: {secretKeyRef: {name: {{ $secret }}, key: {{ $urlKey }}}}
{{- else }}
{{- if $secret }}
- name: REDIS_PASSWORD
  valueFrom: {secretKeyRef: {name: {{ $secret }}, key: {{ $trial | ternary .role (default $redis.passwordKey .passwordKey) }}}}
{{- end }}
{{- if and $redis.sentinel.enabled $redis.sentinel.passwordKey }}
- name: REDIS_SENTINEL_PASSWORD
  valueFrom: {secretKeyRef: {name: {{ $secret }}, key: {{ $redis.sentinel.passwordKey }}}}
{{- end }}
- name: SHIWU_REDIS_URL
  value: {{ include "shiwu.redisUrl" (dict "root" .root "username" ($trial | ternary (printf "shiwu-%s" .role) (default $redis.username .username))) | quote }}
{{- end }}
{{- end -}}

{{- define "shiwu.redisMount" -}}
{{- if and .Values.redis.tls.enabled .Values.redis.tls.caSecret }}
- {name: redis-ca, mountPath: /etc/shiwu/redis-ca, readOnly: true}
{{- end }}
{{- end -}}

{{- define "shiwu.redisVolume" -}}
{{- if and .Values.redis.tls.enabled .Values.redis.tls.caSecret }}
- name: redis-ca
  secret:
    secretName: {{ .Values.redis.tls.caSecret }}
    items: [{key: {{ .Values.redis.tls.caKey }}, path: {{ .Values.redis.tls.caKey }}}]
{{- end }}
{{- end -}}
