{{/* Egress that every part needs: DNS and Redis. */}}
{{- define "shiwu.egress" -}}
- {{ with .v.dnsPeers }}to: {{- toYaml . | nindent 4 }}
  {{ end }}ports:
    - {port: 53, protocol: UDP}
    - {port: 53, protocol: TCP}
- {{ if .root.Values.valkey.enabled }}to:
    - podSelector:
        matchLabels: {{- include "shiwu.selector" (dict "root" .root "part" "valkey") | nindent 10 }}
  {{ else if .v.redisPeers }}to: {{- toYaml .v.redisPeers | nindent 4 }}
  {{ end }}ports:
    {{- range .ports | uniq }}
    - {port: {{ . }}, protocol: TCP}
    {{- end }}
{{- end -}}
