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

{{/* Egress to public web servers, without the ranges that the address rules refuse: private ones, metadata services, IANA's special ones. */}}
{{- define "shiwu.publicWeb" -}}
- to:
    - ipBlock:
        cidr: 0.0.0.0/0
        except:
          - 0.0.0.0/8
          - 10.0.0.0/8
          - 100.64.0.0/10
          - 127.0.0.0/8
          - 168.63.129.16/32
          - 169.254.0.0/16
          - 172.16.0.0/12
          - 192.0.0.0/24
          - 192.0.2.0/24
          - 192.31.196.0/24
          - 192.52.193.0/24
          - 192.88.99.0/24
          - 192.168.0.0/16
          - 192.175.48.0/24
          - 198.18.0.0/15
          - 198.51.100.0/24
          - 203.0.113.0/24
          - 224.0.0.0/4
          - 240.0.0.0/4
    - ipBlock:
        cidr: "2000::/3"
        except:
          - "2001::/23"
          - "2001:db8::/32"
          - "2002::/16"
          - "2620:4f:8000::/48"
          - "3fff::/20"
  ports:
    - {port: 80, protocol: TCP}
    - {port: 443, protocol: TCP}
{{- end -}}
